"""Classes of transformers that normalize and cut texts their own way, whatever the tokenizer.json says.

transformers 5 makes such a tokenizer from the vocabulary and the merges alone
(https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/tokenization_llama.py). Files may
say otherwise, and their ids are those of the class. Knows names; knows no texts.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._util.console import print_note
from .._util.ranks import is_main_process
from .hf_settings import read_optional_json

QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
TO_TEXT = [SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]  # the decoder of SentencePiece's notation
Parts = dict[str, Any]  # parts of a tokenizer.json: key -> step, or None for no step


def qwen2(settings: Mapping[str, Any]) -> Parts:
    pieces = {"type": "Split", "pattern": {"Regex": QWEN2_PIECES}, "behavior": "Isolated", "invert": False}
    steps = [pieces, BYTES | {"trim_offsets": False, "use_regex": False}]
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def gpt2(settings: Mapping[str, Any]) -> Parts:
    return {"normalizer": None, "pre_tokenizer": BYTES | {"add_prefix_space": has_prefix(settings, False)}}


def cohere(settings: Mapping[str, Any]) -> Parts:
    steps = [{"type": "Digits", "individual_digits": True}, gpt2(settings)["pre_tokenizer"]]
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def llama(settings: Mapping[str, Any]) -> Parts:
    """A space before the text, or, with "legacy", before each piece of it that follows a special token."""
    is_prefixed = has_prefix(settings, True)
    scheme = ("always" if settings.get("legacy") else "first") if is_prefixed else "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    decoder = {"type": "Sequence", "decoders": [*TO_TEXT, *([STRIP] if is_prefixed else [])]}
    return {"normalizer": None, "pre_tokenizer": metaspace, "decoder": decoder}


def code_llama(settings: Mapping[str, Any]) -> Parts:
    return llama({**settings, "legacy": False}) | {"decoder": {"type": "Sequence", "decoders": [*TO_TEXT, STRIP]}}


def gemma(settings: Mapping[str, Any]) -> Parts:
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {"type": "Sequence", "decoders": TO_TEXT},
    }


def has_prefix(settings: Mapping[str, Any], default: bool) -> bool:
    value = settings.get("add_prefix_space")
    return default if value is None else bool(value)


# name -> settings of tokenizer_config.json -> the parts of a tokenizer.json that the class has itself
CLASSES: Mapping[str, Callable[[Mapping[str, Any]], Parts]] = {
    "Qwen2Tokenizer": qwen2,
    "GPT2Tokenizer": gpt2,
    "CohereTokenizer": cohere,
    "LlamaTokenizer": llama,
    "CodeLlamaTokenizer": code_llama,
    "GemmaTokenizer": gemma,
}
# Those in SentencePiece's notation. A file in the notation of bytes that names one of them is taken as it is.
OF_WORDS = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"}
DEFAULTS = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # by model_type, where no class is named
ALWAYS = {"qwen2"}  # model types that have that class whatever is named
NEVER = {"mistral", "ministral"}  # model types whose files are taken as they are, whatever is named


def apply_class(source: dict[str, Any], path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json, `source`, as the class of its directory takes it.

    path: of the file. settings: tokenizer_config.json. What is taken otherwise is told in a line.
    """
    model = read_optional_json(path.parent / "config.json", "a model's configuration")
    given = model.get("model_type")
    model_type = given if isinstance(given, str) else ""
    if source["model"].get("type", "BPE") != "BPE" or model_type in NEVER:
        return source
    default = DEFAULTS.get(model_type)
    named = settings.get("tokenizer_class") or model.get("tokenizer_class")
    name = named.removesuffix("Fast") if isinstance(named, str) and model_type not in ALWAYS else default
    if name is None or name not in CLASSES or (name in OF_WORDS and has_bytes(source)):
        return source
    parts = CLASSES[name](settings)
    if all(is_same(source.get(key), part) for key, part in parts.items()):
        return source
    if is_main_process():
        print_note(f"({path}: texts are cut as {name} cuts them, as in transformers, and not as this file says)")
    return source | parts


def has_bytes(source: Mapping[str, Any]) -> bool:
    """Whether the file is in GPT-2's notation, with a letter for each byte."""
    steps = [source.get("pre_tokenizer"), source.get("decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, Mapping):
            if step.get("type") == "ByteLevel":
                return True
            steps += [one for value in step.values() if isinstance(value, list) for one in value]
    return False


def is_same(given: Any, part: Any) -> bool:
    """Whether a step of a tokenizer.json does what this one does: flags that change offsets alone don't count."""
    if isinstance(part, Mapping):
        return isinstance(given, Mapping) and all(
            is_same(given.get(k), v) for k, v in part.items() if k != "trim_offsets"
        )
    if isinstance(part, list):
        return isinstance(given, list) and len(given) == len(part) and all(map(is_same, given, part))
    return bool(given == part)
