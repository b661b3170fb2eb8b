"""Hugging Face's format of checkpoints: `config.json`, and `*.safetensors`, maybe with an index.

Knows no other format.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._util.console import progress_bar
from .._util.files import describe_content, read_json, unreadable_error, write_json
from ..errors import LlamaError
from ..tokenization.export import write_tokenizer_json
from ..tokenizer import Tokenizer
from . import hf_config
from .checkpoint import Checkpoint, CheckpointFormat, Contents, Export
from .compressed_tensors import file_shapes, quantization_config, quantize_tensor
from .families import FAMILIES, Family
from .hf_head import body_name, split_head
from .schema import New, Stored, are_equal, is_linear, is_rotary, permute_rotary
from .side_files import find_tokenizer, is_sentencepiece
from .task_spec import SPECS
from .writing import allocate_on_disk, make_writable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST_NAME = 200
FILE_BYTES = 5 * 10**9  # of a .safetensors file that is written; a single tensor may be larger

# Meta's names of modules -> Hugging Face's, as Llama's files have them. A family may have others.
NAMES = {
    "layers": "layers",
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


def hf_name(name: str, body: str = "model", names: Mapping[str, str] = NAMES) -> str:
    """Meta's name of a tensor -> Hugging Face's.

    body: the prefix of the network's tensors. names: those of the modules, as NAMES.
    """
    module, _, kind = name.rpartition(".")
    if module.startswith("layers."):
        _, layer, rest = module.split(".", 2)
        return f"{body}.{names['layers']}.{layer}.{names[rest]}.{kind}"
    return f"{names[module]}.{kind}" if module == "output" else f"{body}.{names[module]}.{kind}"


def module_names(family: Family | None) -> dict[str, str]:
    """Meta's names of modules -> this family's."""
    return NAMES if family is None else {**NAMES, **family.tensor_names}


def tensor_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """(the files with tensors, the name of the file of each tensor by the index: {} where there is none).

    Raises LlamaError for an index that can't be used.
    """
    index = directory / INDEX
    if not index.exists():
        return [directory / SINGLE], {}
    places = read_json(index, "a checkpoint's index").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
        raise LlamaError(f"{index}: weight_map is not an object of file names by tensor; download it again")
    if refused := [name for name in places.values() if not is_plain(name)]:
        raise LlamaError(f"{index}: weight_map names {refused[0][:LONGEST_NAME]!r}, expected names of files beside it")
    return [directory / name for name in sorted(set(places.values()))], places


def is_plain(name: str) -> bool:
    """Whether it names a file beside the index, and can be shown."""
    return PurePath(name).name == name != "" and name.isprintable() and len(name) <= LONGEST_NAME


def read_file(path: Path) -> dict[str, Tensor]:
    """Map one `.safetensors` file: its tensors by name, which are read from disk when they are used."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.offset_keys()}
    except OSError as e:
        raise unreadable_error(path, e) from e
    except SafetensorError as e:
        reason = describe_content(path)
        if "not the data" not in reason and "empty" not in reason:
            reason = f"{path.stat().st_size} bytes, {e}"
        raise LlamaError(f"{path} is truncated, damaged or no safetensors file ({reason}): download it again") from None


def read_checkpoint(checkpoint: Checkpoint, thorough: bool) -> Contents:
    """Read `config.json` and the files' headers. Returns the tensors of each file, without a head's."""
    directory, config = checkpoint.directory, checkpoint.config
    if not config.is_file():
        checkpoint.blame(config, f"{config} is missing: it comes with the checkpoint, download it too")
    elif (model := checkpoint.attempt(hf_config.read_config, config)) is not None:
        checkpoint.family, checkpoint.args, checkpoint.quantization = model.family, model.args, model.quantization
        checkpoint.task, checkpoint.head = model.task, model.head
    files, places = checkpoint.attempt(tensor_files, directory) or ([], {})
    if not any(path.exists() for path in files):  # the index is broken or gone, but there are files
        files = sorted({*files, *directory.glob("*.safetensors")})
    checkpoint.files = files
    contents = []
    for path in files:
        if not path.exists():
            why = f"which {INDEX} names" if places else f"and there is no {INDEX} that names others"
            checkpoint.blame(path, f"{path} is missing, {why}: download it")
            continue
        tensors = checkpoint.attempt(read_file, path)
        if tensors is None:
            continue
        body, head = split_head(tensors, checkpoint.task)
        contents.append(body)
        if repeated := sorted(head.keys() & checkpoint.head_tensors.keys()):
            checkpoint.blame(path, f"{path} has {repeated[0]}, and so has a file before it")
        checkpoint.head_tensors |= head
        if absent := [name for name, place in places.items() if place == path.name and name not in tensors]:
            checkpoint.blame(
                path,
                f"{path} has no {absent[0]}, where {INDEX} places it ({len(absent)} such): "
                "are both of the same download?",
            )
    return contents


def spell(checkpoint: Checkpoint, name: str) -> str:
    """Meta's name of a tensor -> the one in these files, as `split_head` leaves it."""
    body = "model" if SPECS[checkpoint.task].tensors else checkpoint.body
    return hf_name(name, body, module_names(checkpoint.family))


def gather(checkpoint: Checkpoint, files: Contents, thorough: bool) -> tuple[dict[str, Stored], list[str]]:
    """Find the model's tensors in all files: (whole tensors by Meta's name, misfits)."""
    args = checkpoint.sizes
    remaining = {name: tensor for file in files for name, tensor in file.items()}
    counts = Counter(name for file in files for name in file)
    tensors, head_dim = {}, args.head_size
    for name in file_shapes(args, checkpoint.quantization):
        tensor = remaining.pop(spell(checkpoint, name), None)
        if tensor is not None:
            hf_head_dim = head_dim if is_rotary(name) and tensor.shape[:1].numel() % head_dim == 0 else None
            tensors[name] = Stored(spell(checkpoint, name), (tensor,), hf_head_dim=hf_head_dim)
    misfits = [f"{name} is in {count} files" for name, count in counts.items() if count > 1]
    output = spell(checkpoint, "output.weight")
    if args.tied_embeddings and (repeated := remaining.pop(output, None)) is not None:
        embedding = tensors.get("tok_embeddings.weight")
        if embedding is not None and not are_equal(repeated, embedding.pieces[0], thorough):
            misfits.append(f"{output} differs from the embedding, which config.json says it is tied to")
    return tensors, misfits + [f"surplus {name}" for name in remaining if not name.endswith("rotary_emb.inv_freq")]


# --- writing --------------------------------------------------------------------------------------------------------


def make_config(export: Export) -> dict[str, Any]:
    """The `config.json` of the written model."""
    checkpoint, args = export.checkpoint, export.checkpoint.sizes
    dtype = export.dtype or checkpoint.dtype
    config = hf_config.config_of(args, export.source_config, dtype, checkpoint.task, checkpoint.head)
    if export.quantization is not None:
        config["quantization_config"] = quantization_config(export.quantization, args.tied_embeddings)
    return config


def write_files(export: Export, config: Mapping[str, Any], sizes: Mapping[str, int], directory: Path) -> None:
    """Write `*.safetensors`, with an index if there are several, and Meta's tokenizer as a tokenizer.json."""
    checkpoint, new = export.checkpoint, partial(allocate_on_disk, directory)
    family = FAMILIES[config["model_type"]]
    body, names = body_name(family, checkpoint.task), module_names(family)
    files = list(split_files(sizes))
    places: dict[str, str] = {}
    total = 0
    with progress_bar("writing", len(sizes), " tensors") as bar:
        for number, file_names in enumerate(files, start=1):
            file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name in file_names:
                for part, tensor in convert_tensor(export, name, new).items():
                    tensors[hf_name(part, body, names)] = tensor
                bar.update()
            if number == len(files):
                head = checkpoint.head_tensors.items()
                tensors |= {name: make_writable(tensor, export.dtype, new) for name, tensor in head}
            save_file(tensors, directory / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    tokenizer = find_tokenizer(checkpoint)
    if tokenizer.name == "tokenizer.model" and tokenizer.is_file() and not is_sentencepiece(tokenizer):
        write_tokenizer_json(Tokenizer(tokenizer), directory)


def convert_tensor(export: Export, name: str, new: New) -> dict[str, Tensor]:
    """A tensor of the checkpoint as the files hold it, by Meta's name; of a quantized matrix, its parts."""
    checkpoint = export.checkpoint
    whole = checkpoint.part(name, new=new)
    if is_rotary(name):
        whole = permute_rotary(whole, checkpoint.sizes.head_size, "hf", new)
    if export.quantization is None or not is_linear(name):
        return {name: make_writable(whole, export.dtype, new)}
    return quantize_tensor(whole, name, export.quantization, export.dtype or whole.dtype, new)


def split_files(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Which tensors go into each file.

    sizes: the bytes of each tensor.
    """
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > FILE_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


FORMAT = CheckpointFormat(
    name="hf",
    label="Hugging Face",
    config="config.json",
    example=SINGLE,
    patterns=("*.safetensors", INDEX),
    written_patterns=(SINGLE, "model-*-of-*.safetensors", INDEX),
    tokenizers=("tokenizer.json", "tokenizer.model"),
    holds_heads=True,
    holds_quantized=True,
    holds_shards=False,
    read=read_checkpoint,
    gather=gather,
    spell=spell,
    make_config=make_config,
    write=write_files,
    largest_file=lambda size, mp_size: min(size, FILE_BYTES),
)
