"""The bodies of requests, as the API documents them: https://platform.openai.com/docs/api-reference.

A field that isn't here is refused by name. Knows no model; what a field does is its endpoint's.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Tokens = list[Annotated[int, Field(ge=0)]]
Number = Annotated[float, Field(allow_inf_nan=False)]
MOST_CHOICES, MOST_TOP_LOGPROBS, MOST_BEAMS = 128, 20, 16


class Body(BaseModel):
    """A body whose fields have exactly their types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def check_characters(cls, data: Any) -> Any:
        """Raise for halves of characters, which JSON can escape and no text can have."""
        try:
            json.dumps(data, ensure_ascii=False, allow_nan=False, default=str).encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("half_character", "has half of a character, a lone surrogate") from None
        except ValueError:
            raise PydanticCustomError("not_finite", "has a number that is too large, or none") from None
        except RecursionError:
            raise PydanticCustomError("too_deep", "has arrays or objects too deep in each other") from None
        return data


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Sampling(Body):
    """What the endpoints that generate have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # for the client's own records, as are the next two
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Beside the API:
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=MOST_BEAMS)] | None = None  # above 1: search for the likeliest
    cache_prompt: bool | None = None  # False: begin at nothing cached, and leave nothing to others

    @property
    def has_beams(self) -> bool:
        return self.num_beams not in (None, 1)


class ChatBody(Sampling):
    """POST /v1/chat/completions"""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Sampling):
    """POST /v1/completions"""

    prompt: str | list[str] | Tokens | list[Tokens]
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    suffix: None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    input: str | list[str] | Tokens | list[Tokens]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or a dialog as its template writes it."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    tokens: Tokens
    model: str | None = None
