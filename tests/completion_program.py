"""What tests of a Llama's answers run on ranks: builds a checkpoint's model and asks it once."""

from dataclasses import asdict
from typing import Any

from llama import Llama


def complete(
    ckpt_dir: str, build: dict[str, Any], arguments: list[Any], options: dict[str, Any]
) -> tuple[list[dict[str, Any]], float | None]:
    """(the answers' fields, the share of proposed tokens that were right) of `Llama.complete`."""
    llama = Llama.build(ckpt_dir, **build)
    return [asdict(answer) for answer in llama.complete(*arguments, **options)], llama.acceptance
