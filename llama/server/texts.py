"""POST /v1/embeddings, /tokenize and /detokenize.

Knows their fields; knows no socket.
"""

import asyncio
import base64
from typing import Any

import numpy as np

from ..engine.ending import Ending
from ..engine.request_checks import check_prompts
from ..engine.scoring import embed_tokens
from ..errors import LlamaError
from .completions import encode_prompts
from .errors import ApiError, bad_value, refused, too_late, unsupported
from .messages import encode_dialog
from .protocol import DetokenizeBody, EmbeddingBody, TokenizeBody
from .service import Service


async def embed(service: Service, body: EmbeddingBody) -> dict[str, Any]:
    """A vector for each text: its last token's state. Raises ApiError.

    As many texts go to the engine at a time as one pass has rows, so that other requests come between them.
    """
    service.check_model(body.model)
    tokens = await service.call(encode_texts, service, body)
    engine, most = service.llama.engine, service.llama.model.params.max_batch_size
    vectors: list[np.ndarray] = []
    ending, seconds = Ending(), service.options.timeout
    with service.admit(min(len(tokens), most)):
        try:
            async with asyncio.timeout(seconds):
                for start in range(0, len(tokens), most):
                    some = tokens[start : start + most]
                    vectors += list((await service.call(embed_tokens, engine, some, ending=ending)).numpy())
        except TimeoutError:
            raise too_late(seconds) from None
        finally:
            ending.end(engine)
    data = [
        {"object": "embedding", "index": i, "embedding": write_vector(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    count = sum(map(len, tokens))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": service.options.model, "usage": usage}


def encode_texts(service: Service, body: EmbeddingBody) -> list[list[int]]:
    """The texts' tokens, which fit the model. Raises ApiError, and LlamaError."""
    if body.dimensions is not None and body.dimensions != service.llama.model.params.dim:
        raise unsupported("dimensions", f"is {service.llama.model.params.dim} here: vectors aren't cut")
    tokens = encode_prompts(service, body.input, "input")
    try:
        check_prompts(tokens, service.llama.model.params)
    except LlamaError as e:
        raise refused(e, "input") from e
    return tokens


def write_vector(vector: np.ndarray, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
    if body.messages is not None:
        if body.add_special_tokens is False:
            raise bad_value("add_special_tokens is false, and a dialog's template writes them", "add_special_tokens")
        tokens = encode_dialog(service.llama.formatter, body.messages, {})
    else:
        tokens = service.llama.tokenizer.encode(body.prompt or "", bos=body.add_special_tokens is not False, eos=False)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_seq_len}


def detokenize(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    service.check_model(body.model)
    if wrong := [token for token in body.tokens if token >= service.llama.model.params.vocab_size]:
        message = f"tokens has {wrong[0]}, expected ids below {service.llama.model.params.vocab_size}"
        raise ApiError(400, message, param="tokens", code="invalid_value")
    return {"prompt": service.llama.tokenizer.decode(body.tokens)}
