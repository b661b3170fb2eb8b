"""Hugging Face's format of checkpoints: `config.json`, and `*.safetensors`, maybe with an index.

Knows no other format.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .._util.console import progress_bar
from .._util.files import describe_missing, write_json
from ..tokenization.export import write_tokenizer_json
from ..tokenization.versions import is_llama_3_1
from ..tokenizer import Tokenizer
from . import hf_config, hf_config_writing
from .checkpoint import Checkpoint, CheckpointFormat, Contents, Export
from .compressed_tensors import file_shapes, quantization_config, quantize_tensor
from .families import FAMILIES, Family
from .hf_files import INDEX, SINGLE, read_file, tensor_files
from .hf_head import body_name, split_head
from .schema import New, Stored, are_equal, is_linear, is_rotary, permute_rotary
from .side_files import find_tokenizer, is_sentencepiece
from .task_spec import SPECS
from .writing import allocate_on_disk, make_writable

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


def read_checkpoint(checkpoint: Checkpoint, thorough: bool) -> Contents:
    """Read `config.json` and the files' headers. Returns the tensors of each file, without a head's."""
    opened = open_files(checkpoint)
    problems, checkpoint.problems = checkpoint.problems, []  # the configuration's come first
    config, model = checkpoint.config, None
    if not config.exists():
        checkpoint.blame(config, f"{describe_missing(config)}: it comes with the checkpoint, download it too")
    else:
        names = {name for tensors in opened.values() for name in tensors}
        model = checkpoint.attempt(partial(hf_config.read_config, names=names), config)
    checkpoint.problems += problems
    if model is not None:
        checkpoint.family, checkpoint.args, checkpoint.quantization = model.family, model.args, model.quantization
        checkpoint.task, checkpoint.head = model.task, model.head
        checkpoint.notes += [model.note] if model.note else []
    contents = []
    for path, tensors in opened.items():
        body, head = split_head(tensors, checkpoint.task)
        contents.append(add_prefix(checkpoint, body))
        if repeated := sorted(head.keys() & checkpoint.head_tensors.keys()):
            checkpoint.blame(path, f"{path} has {repeated[0]}, and so has a file before it")
        checkpoint.head_tensors |= head
    if model is not None and not checkpoint.problems and lacks_output(checkpoint, contents, model.is_backbone):
        checkpoint.has_output, checkpoint.args = False, replace(model.args, tied_embeddings=True)
    return contents


def open_files(checkpoint: Checkpoint) -> dict[Path, dict[str, Tensor]]:
    """The tensors of each file that can be read, by their names in it."""
    directory = checkpoint.directory
    files, places = checkpoint.attempt(tensor_files, directory) or ([], {})
    if not any(path.exists() for path in files):  # the index is broken or gone, but there are files
        files = sorted({*files, *directory.glob("*.safetensors")})
    if not places and (directory / INDEX).exists() and not checkpoint.problems:
        checkpoint.notes.append(f"{directory / SINGLE} is read, and not the files that {INDEX} names")
    checkpoint.files = files
    opened = {}
    for path in files:
        if not path.exists():
            why = f"which {INDEX} names" if places else f"and there is no {INDEX} that names others"
            checkpoint.blame(path, f"{describe_missing(path)}, {why}: download it")
            continue
        tensors = checkpoint.attempt(read_file, path)
        if tensors is None:
            continue
        opened[path] = tensors
        if absent := [name for name, place in places.items() if place == path.name and name not in tensors]:
            checkpoint.blame(
                path,
                f"{path} has no {absent[0]}, where {INDEX} places it ({len(absent)} such): "
                "are both of the same download?",
            )
    return opened


def add_prefix(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with the network's prefix where the file leaves it out.

    transformers writes a network so that is saved without its output layer, and reads any network so.
    """
    module = module_names(checkpoint.family)
    parts = {module[name].partition(".")[0] for name in ("layers", "tok_embeddings", "norm")}
    bare = [name for name in tensors if name.partition(".")[0] in parts]
    new = {name: full for name in bare if (full := f"{prefix_of(checkpoint)}.{name}") not in tensors}
    checkpoint.file_names |= {full: name for name, full in new.items()}
    return {new.get(name, name): tensor for name, tensor in tensors.items()}


def lacks_output(checkpoint: Checkpoint, contents: Contents, is_backbone: bool) -> bool:
    """Whether the checkpoint is a network alone: by its class or its tensors' names, and by what is there of tensors.

    is_backbone: whether it is by its class.
    """
    if checkpoint.head is not None or checkpoint.sizes.tied_embeddings:
        return False
    output = spell(checkpoint, "output.weight").rpartition(".")[0]
    is_there = any(name.startswith(output + ".") for tensors in contents for name in tensors)
    return not is_there and (is_backbone or bool(checkpoint.file_names))


def prefix_of(checkpoint: Checkpoint) -> str:
    """The network's prefix in the names that `split_head` leaves."""
    return "model" if SPECS[checkpoint.task].tensors else checkpoint.body


def spell(checkpoint: Checkpoint, name: str) -> str:
    """Meta's name of a tensor -> the usual one of this family, which `read_checkpoint` gives it."""
    return hf_name(name, prefix_of(checkpoint), module_names(checkpoint.family))


def spell_as_in_file(checkpoint: Checkpoint, name: str) -> str:
    """Meta's name of a tensor -> the one in these files."""
    usual = spell(checkpoint, name)
    return checkpoint.file_names.get(usual, usual)


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
            tensors[name] = Stored(spell_as_in_file(checkpoint, name), (tensor,), hf_head_dim=hf_head_dim)
    misfits = [f"{name} is in {count} files" for name, count in counts.items() if count > 1]
    output = spell(checkpoint, "output.weight")
    if args.tied_embeddings and (repeated := remaining.pop(output, None)) is not None:
        embedding = tensors.get("tok_embeddings.weight")
        if embedding is not None and not are_equal(repeated, embedding.pieces[0], thorough):
            misfits.append(f"{output} differs from the embedding, which config.json says it is tied to")
    return tensors, misfits + [
        f"surplus {checkpoint.file_names.get(name, name)}"
        for name in remaining
        if not name.endswith("rotary_emb.inv_freq")
    ]


# --- writing --------------------------------------------------------------------------------------------------------


def make_config(export: Export) -> dict[str, Any]:
    """The `config.json` of the written model."""
    checkpoint, args = export.checkpoint, export.checkpoint.sizes
    dtype = export.dtype or checkpoint.dtype
    model = (checkpoint.task, checkpoint.head, checkpoint.has_output)
    config = hf_config_writing.config_of(args, export.source_config, dtype, *model)
    if export.quantization is not None:
        is_tied = args.tied_embeddings and checkpoint.has_output
        config["quantization_config"] = quantization_config(export.quantization, is_tied)
    return config


def write_files(export: Export, config: Mapping[str, Any], sizes: Mapping[str, int], directory: Path) -> None:
    """Write `*.safetensors`, with an index if there are several, and Meta's tokenizer as a tokenizer.json."""
    checkpoint, args, new = export.checkpoint, export.checkpoint.sizes, partial(allocate_on_disk, directory)
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
        write_tokenizer_json(Tokenizer(tokenizer, is_llama_3_1=is_llama_3_1(args)), directory)


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
    spell=spell_as_in_file,
    make_config=make_config,
    write=write_files,
    largest_file=lambda size, mp_size: min(size, FILE_BYTES),
)
