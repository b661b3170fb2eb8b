"""Opens a checkpoint with an adapter: given as two directories, or as the adapter's own, which names its base.

Knows directories; what an adapter does to tensors is in `merging`.
"""

import os
from pathlib import Path

import torch

from .._util.files import read_json
from .._util.urls import is_url
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.loader import holds_adapter, open_checkpoint, survey
from ..errors import LlamaError, shorten
from .merging import adapt
from .peft_config import CONFIG
from .reading import check_adapter_dir, read_adapter

BASE = "base_model_name_or_path"


def find_base(ckpt_dir: str | Path, adapter_dir: str | Path | None = None) -> tuple[str | Path, str | Path | None]:
    """(the directory of the base, that of the adapter or None). ckpt_dir may be an adapter's own directory.

    Raises LlamaError for an adapter whose base isn't on this machine, and for a directory with an adapter and a model.
    """
    if adapter_dir is not None and not isinstance(adapter_dir, str | os.PathLike):
        raise LlamaError(f"adapter_dir is {shorten(adapter_dir)}, expected the path of an adapter's directory")
    if not holds_adapter(ckpt_dir):
        if adapter_dir is not None and adapter_dir == ckpt_dir and not is_url(adapter_dir):
            check_adapter_dir(Path(adapter_dir))  # the adapter's directory stands for both
        return ckpt_dir, adapter_dir
    directory, model = Path(ckpt_dir), find_model_files(Path(ckpt_dir))
    if adapter_dir is not None and (model or os.path.realpath(directory) != os.path.realpath(adapter_dir)):
        return ckpt_dir, adapter_dir
    if model:
        raise LlamaError(
            f"ckpt_dir {directory} holds a model ({', '.join(model)}) and an adapter ({CONFIG}): give "
            f"adapter_dir={directory} too for both together, or move one of them"
        )
    return find_named_base(directory), directory


def find_model_files(directory: Path) -> list[str]:
    """The configuration and a file of tensors of a model in an adapter's directory; [] if there isn't both."""
    configs = [name for name in ("config.json", "params.json") if (directory / name).is_file()]
    paths = [path.name for pattern in ("*.safetensors", "*.pth") for path in sorted(directory.glob(pattern))]
    weights = [name for name in paths if not name.startswith("adapter_")]
    return [configs[0], weights[0]] if configs and weights else []


def find_named_base(directory: Path) -> Path:
    """The directory that an adapter's configuration names: as it stands there, or from the adapter's or its parent."""
    name = read_json(directory / CONFIG, "an adapter's configuration").get(BASE)
    advice = f"give the base's directory as ckpt_dir, and adapter_dir={directory}"
    if not isinstance(name, str) or name == "":
        raise LlamaError(f"{directory / CONFIG}: {BASE} is {shorten(name)}, expected the base's directory: {advice}")
    for base in dict.fromkeys((directory / name, directory.parent / name, Path(name))):
        if base.is_dir() and base.resolve() != directory.resolve():
            if holds_adapter(base) and not find_model_files(base):
                raise LlamaError(f"{directory / CONFIG}: {BASE} is {name!r}, which holds an adapter itself: {advice}")
            return base
    raise LlamaError(
        f"{directory / CONFIG}: {BASE} is {shorten(name, 200)}, and there is no such directory in {directory}, in "
        f"{directory.parent} or here: download the base, then {advice}"
    )


def open_adapted(
    ckpt_dir: str | Path, adapter_dir: str | Path | None = None, *, dtype: torch.dtype | None = None
) -> Checkpoint:
    """A thorough `survey` of a checkpoint, with the adapter merged into its tensors when they are read.

    dtype: of the tensors that the adapter changes; None: the base's. Raises LlamaError if anything is wrong.
    """
    base, adapter_dir = find_base(ckpt_dir, adapter_dir)
    checkpoint = open_checkpoint(base)
    return checkpoint if adapter_dir is None else add_adapter(checkpoint, adapter_dir, dtype)


def survey_adapted(
    ckpt_dir: str | Path, adapter_dir: str | Path | None = None, *, argument: str = "ckpt_dir"
) -> Checkpoint:
    """As `survey`. What is wrong with the adapter is among the result's problems."""
    base, adapter_dir = find_base(ckpt_dir, adapter_dir)
    checkpoint = survey(base, argument=argument)
    if adapter_dir is None:
        return checkpoint
    checkpoint.adapter = Path(adapter_dir)
    if checkpoint.args is None or checkpoint.problems or checkpoint.misfits:
        return checkpoint
    try:
        return add_adapter(checkpoint, adapter_dir)
    except LlamaError as e:
        checkpoint.problems.append(str(e))
        return checkpoint


def add_adapter(checkpoint: Checkpoint, adapter_dir: str | Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """The checkpoint with the adapter merged. Raises LlamaError for one with a task head that this model hasn't."""
    adapter = read_adapter(Path(adapter_dir), checkpoint.sizes, checkpoint.family)
    if adapter.extra:
        raise LlamaError(
            f"{adapter.directory} holds a task head ({next(iter(adapter.extra))}), which only "
            "llama.TaskModel.build(adapter_dir=...) reads"
        )
    return adapt(checkpoint, adapter, dtype=dtype)
