"""Checkpoints of which all is known but their tensors: what can't work is refused here, before one is loaded.

Knows where they lie and what becomes of them; knows no tokenizer and no text.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from .. import parallel
from ..accelerate.accelerator import Acceleration, Accelerator
from ..accelerate.quantization import bits_of
from ..errors import LlamaError
from ..model import ModelArgs, Transformer
from ..parallel import Place
from .download import cache_directory, is_url, local_copy
from .fit import agreed_quantization, check_ranks
from .loader import Checkpoint, load_model, open_checkpoint
from .schema import memory_needed


@dataclass(frozen=True)
class Opened:
    """A model to be loaded. args: its sizes, and the KV cache's."""

    checkpoint: Checkpoint
    args: ModelArgs
    place: Place
    acceleration: Acceleration

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that a rank needs for (weights, KV cache)."""
        return memory_needed(self.args, self.place.mp_size, self.place.dtype, bits_of(self.acceleration.quantization))

    def load(self) -> Transformer:
        accelerator = Accelerator(self.acceleration)
        model = load_model(self.checkpoint, self.args, self.place, accelerator.pack_weight)
        accelerator.finish(model)
        return model


def on_this_machine(ckpt_dir: str | Path) -> str | Path:
    """The directory itself, or of a URL the copy of what is there. Called on all ranks alike."""
    if not is_url(ckpt_dir):
        return ckpt_dir
    with parallel.raise_together(parallel.new_long_timeout_group()):
        if parallel.is_machine_leader():
            local_copy(str(ckpt_dir))
    return cache_directory(str(ckpt_dir))


def check_generates(checkpoint: Checkpoint) -> None:
    if checkpoint.head is not None:
        raise LlamaError(
            f"{checkpoint.directory} has no output layer to generate with, but a head to {checkpoint.task} texts: "
            "llama.TaskModel.build reads it"
        )


def sized(
    checkpoint: Checkpoint, place: Place, max_seq_len: int, max_batch_size: int, own_dtype: bool
) -> tuple[ModelArgs, Place]:
    """The sizes that a checkpoint's model is built with, and where. Raises LlamaError where so many ranks can't."""
    args = replace(checkpoint.sizes, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    check_ranks(checkpoint.directory, args, place.mp_size, checkpoint.group)
    return args, replace(place, dtype=checkpoint.dtype) if own_dtype else place


def opened(
    ckpt_dir: str | Path,
    place: Place,
    acceleration: Acceleration,
    max_seq_len: int,
    max_batch_size: int,
    own_dtype: bool,
) -> Opened:
    """A model to generate with. own_dtype: compute in the dtype of the files.

    Raises LlamaError for what no rank could load.
    """
    checkpoint = open_checkpoint(ckpt_dir)
    check_generates(checkpoint)
    args, place = sized(checkpoint, place, max_seq_len, max_batch_size, own_dtype)
    agreed = agreed_quantization(checkpoint.directory, checkpoint.quantization, acceleration.quantization)
    return Opened(checkpoint, args, place, replace(acceleration, quantization=agreed))
