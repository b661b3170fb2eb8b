"""Hugging Face's layout on disk: `*.safetensors`, maybe with an index, and the names of the tensors in them.

Knows no other layout.
"""

from collections import Counter
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._util.files import describe_content, read_json, unreadable
from ..accelerate.quantization import Quantization
from ..errors import LlamaError
from ..model import ModelArgs
from .compressed_tensors import file_shapes
from .schema import Stored, is_rotary, repeats

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST_NAME = 200

NAMES = {
    "tok_embeddings": "embed_tokens",
    "norm": "norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str, body: str = "model") -> str:
    """Meta's name of a tensor -> Hugging Face's; body: what the Transformer is called there."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, layer, rest = stem.split(".", 2)
        return f"{body}.layers.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}" if stem == "output" else f"{body}.{NAMES[stem]}.{kind}"


def tensor_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the tensors, and where the index says that each lies (nothing, without an index).

    Raises LlamaError for an index that can't be used.
    """
    index = directory / INDEX
    if not index.exists():
        return [directory / SINGLE], {}
    places = read_json(index, "a checkpoint's index").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
        raise LlamaError(f"{index}: weight_map is not an object of file names by tensor; download it again")
    if odd := [name for name in places.values() if not is_plain(name)]:
        raise LlamaError(f"{index}: weight_map names {odd[0][:LONGEST_NAME]!r}, expected names of files beside it")
    return [directory / name for name in sorted(set(places.values()))], places


def is_plain(name: str) -> bool:
    """Whether it names a file beside the index, and can be shown."""
    return PurePath(name).name == name != "" and name.isprintable() and len(name) <= LONGEST_NAME


def read_file(path: Path) -> dict[str, Tensor]:
    """Map one `.safetensors` file: names to tensors that are read from disk when they are used."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.offset_keys()}
    except OSError as e:
        raise unreadable(path, e) from e
    except SafetensorError as e:
        found = describe_content(path)
        wrong = found if "not the data" in found or "empty" in found else f"{path.stat().st_size} bytes, {e}"
        raise LlamaError(f"{path} is truncated, damaged or no safetensors file ({wrong}): download it again") from None


def gather(
    files: list[dict[str, Tensor]], args: ModelArgs, thorough: bool, quantization: Quantization | None
) -> tuple[dict[str, Stored], list[str]]:
    """(whole tensors by Meta's name, what is surplus or doesn't fit)."""
    found = {name: tensor for file in files for name, tensor in file.items()}
    counts = Counter(name for file in files for name in file)
    tensors, head_dim = {}, args.head_size
    for name in file_shapes(args, quantization):
        tensor = found.pop(hf_name(name), None)
        if tensor is not None:
            halves = head_dim if is_rotary(name) and tensor.shape[:1].numel() % head_dim == 0 else None
            tensors[name] = Stored(hf_name(name), (tensor,), halves=halves)
    problems = [f"{name} is in {count} files" for name, count in counts.items() if count > 1]
    if args.tied_embeddings and (repeated := found.pop("lm_head.weight", None)) is not None:
        embedding = tensors.get("tok_embeddings.weight")
        if embedding is not None and not repeats(repeated, embedding.pieces[0], thorough):
            problems.append("lm_head.weight differs from the embedding, which config.json says it is tied to")
    return tensors, problems + [f"surplus {name}" for name in found if not name.endswith("rotary_emb.inv_freq")]
