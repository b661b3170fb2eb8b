"""`python -m llama bench`: how fast a model runs here. Loaded by the command line's `bench` alone."""
