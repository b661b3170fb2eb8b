"""Opens the tokenizer that belongs to a checkpoint: the one beside its tensors, or beside its adapter's.

Knows directories; what a tokenizer's files mean is in `tokenization`.
"""

from pathlib import Path

from ..tokenization.hf_settings import read_stop_ids
from ..tokenization.hf_tokenizer import HFTokenizer, open_tokenizer
from ..tokenizer import Tokenizer
from .checkpoint import Checkpoint
from .side_files import find_side_files, find_tokenizer


def open_tokenizer_of(checkpoint: Checkpoint, path: str | Path | None = None) -> Tokenizer | HFTokenizer:
    """The tokenizer at `path`; None: the checkpoint's own. Raises LlamaError for files that can't be read.

    Beside an adapter mostly lies a tokenizer, but no settings of generation: the stop tokens are then the base's.
    """
    path = path or find_tokenizer(checkpoint)
    tokenizer = open_tokenizer(path, checkpoint.args)
    if isinstance(tokenizer, HFTokenizer) and Path(path).parent == checkpoint.adapter:
        for settings in find_side_files(checkpoint, "generation_config.json", "config.json"):
            if stops := read_stop_ids(settings, tokenizer.n_words):
                tokenizer.stop_tokens = set(stops)
                break
    return tokenizer
