"""How many positions a model was made for, as its config.json says; a longer text runs, and may come out badly.

Knows that file; knows no network and no cache.
"""

from ..errors import LlamaError
from .checkpoint import Checkpoint
from .hf_config import read_config
from .side_files import find_side_files


def read_trained_length(checkpoint: Checkpoint) -> int | None:
    """What the config.json beside the tensors says.

    None where the file doesn't say, isn't there, or can't be read, which opening the checkpoint tells.
    """
    paths = find_side_files(checkpoint, "config.json")
    try:
        return read_config(paths[0]).trained_length if paths else None
    except LlamaError:
        return None


def describe_excess(checkpoint: Checkpoint, max_seq_len: int) -> str | None:
    """A line for people if the model wasn't made for so many positions, else None."""
    length = read_trained_length(checkpoint)
    if length is None or max_seq_len <= length:
        return None
    return (
        f"max_seq_len {max_seq_len} is more than the {length} positions that the model was made for: what is past them "
        "may come out badly"
    )
