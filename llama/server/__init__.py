"""OpenAI's protocol over HTTP, on the engine. Knows requests of HTTP; knows no tensor."""
