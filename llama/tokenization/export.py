"""Llama 3's tokenizer.model -> the files of Hugging Face's format: tokenizer.json, its settings, a chat template.

Knows vocabularies; knows no checkpoints.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from .._util.files import write_json, write_whole
from ..tokenizer import ChatFormat, Tokenizer
from .pieces import byte_letters


def write_tokenizer_json(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json of `tokenizer` to `directory`."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    bos, eos = names[tokenizer.bos_id], names[tokenizer.eos_id]
    text = make_backend(tokenizer, bos).to_str(pretty=True)
    write_whole(directory / "tokenizer.json", lambda f: f.write(text.encode()))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": ChatFormat.template,
    }
    write_json(directory / "tokenizer_config.json", settings)
    stops = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_tokens)}
    write_json(directory / "generation_config.json", stops)


def make_backend(tokenizer: Tokenizer, bos: str) -> Backend:
    """The same byte-pair encoding in Hugging Face's library, with the token `bos` before every text."""
    letters = {byte: letter for letter, byte in byte_letters().items()}
    ranks = {tokenizer.decode_bytes(rank): rank for rank in range(tokenizer.n_words - len(tokenizer.special_tokens))}
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = [pair for token in ranks if (pair := find_last_merge(token, ranks)) is not None]
    merges = [(words[left], words[right]) for left, right in pairs]
    model = BPE(vocab={words[token]: rank for token, rank in ranks.items()}, merges=merges, ignore_merges=True)
    result = Backend(model)
    split = pre_tokenizers.Split(Regex(tokenizer.pat_str), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    result.decoder = decoders.ByteLevel()
    controls = sorted(tokenizer.special_tokens, key=lambda name: tokenizer.special_tokens[name])
    result.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
    result.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    return result


def find_last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that byte-pair encoding merges into `token`; None if it never makes this token.

    Ranks say which tokens there are, but not what they are merged from. So the token is encoded with the merges of
    lower rank, until two parts are left.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        lowest = min(merged)
        if lowest >= ranks[token]:
            return None
        i = merged.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None
