"""How a model is packed while it is loaded, and given its fast form.

Knows layers and packed matrices; knows no files and no generation. Without kernels matrices stay as they are, and on a
GPU unless they are quantized.
"""

import shutil
from dataclasses import dataclass, replace
from typing import cast

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor

from ..errors import LlamaError, shorten
from ..model import Transformer
from ..parallel import Place, initialize
from .fast_model import FastModel
from .kernels import dispatch
from .layers import packed_weight
from .memory_pages import mapped_ranges, trim_heap
from .plain_weights import PackedWeight, Watch, lazy
from .quantization import BITS, FloatMatrix, PackedMatrix, Quantization, QuantizedMatrix
from .shared_memory import share_memory


@dataclass(frozen=True)
class Acceleration:
    """How models are made fast. Raises LlamaError for an unknown quantization, and for compile without a compiler."""

    quantization: Quantization | None = None  # None: matrices are packed as they are
    compile: bool = False  # have all decode steps ready: compiled by torch, or captured where that is faster

    def __post_init__(self) -> None:
        if self.compile and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise LlamaError("compile=True needs a C++ compiler, and none is here: install g++ or leave compile out")
        if self.quantization is not None and self.quantization not in BITS:
            raise LlamaError(f"quantization is {shorten(self.quantization)}, expected None or one of {', '.join(BITS)}")


class Accelerator:
    """Makes one model fast: `pack_weight` for each tensor as it is loaded, then `finish`."""

    def __init__(self, acceleration: Acceleration | None = None):
        self.acceleration = acceleration or Acceleration()
        self.watch = Watch()

    def pack_weight(self, model: Transformer, name: str, quantized: QuantizedMatrix | None = None) -> None:
        """Pack the tensor `name`, which was just loaded, before the next one is.

        quantized: the matrix, if the checkpoint stores it quantized; then the layer has no tensor yet.
        """
        layer_name, _, kind = name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if kind != "weight":
            return
        trim_heap()  # what the tensor before this one was made from
        is_tied = isinstance(layer, VocabParallelEmbedding) and model.params.tied_embeddings
        if not is_tied and not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            return
        plain = cast(Tensor, layer.weight).detach()
        packed = self._pack(plain, from_file=True) if quantized is None else quantized
        if packed is None:
            return
        is_same = quantized is None and isinstance(packed, FloatMatrix)  # as the numbers in the file
        weight = PackedWeight(packed, self._pack, self.watch, plain if is_same and lies_in_file(plain) else None)
        lazy(layer, "weight", weight)
        if is_tied:
            lazy(model.output, "weight", weight)

    def finish(self, model: Transformer) -> None:
        """Give the model its fast form, once all tensors are loaded. Called on all ranks."""
        model.eval()
        norm = model.norm.weight.detach()
        if dispatch.is_available(norm):
            dispatch.register()
        shared = share_memory() if norm.device.type == "cpu" else None
        is_packed = any(weight is not None for weight in map(packed_weight, model.modules()))
        if is_packed or self.acceleration.compile or shared is not None or dispatch.is_available(norm):
            model.fast = FastModel(model, self.watch, shared, self.acceleration.compile)

    def _pack(self, weight: Tensor, from_file: bool = False) -> PackedMatrix | None:
        if self.acceleration.quantization is not None:
            return QuantizedMatrix(weight, BITS[self.acceleration.quantization], from_file=from_file)
        return FloatMatrix(weight, from_file) if dispatch.can_pack(weight) else None


def find_place(
    model_parallel_size: int | None, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> Place:
    """`parallel.initialize`, with the dtype that is fastest here where none is given.

    Kernels compute in bfloat16 on processors on which torch doesn't.
    """
    place = initialize(model_parallel_size, device, dtype)
    if dtype is None and place.device.type == "cpu" and dispatch.is_available(torch.empty(0)):
        return replace(place, dtype=torch.bfloat16)
    return place


def lies_in_file(tensor: Tensor) -> bool:
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return any(first <= start and end <= last for first, last in mapped_ranges())


def accelerate(model: Transformer, names: list[str], quantization: Quantization | None = None) -> None:
    """Pack a model that was loaded plain. names: of its tensors."""
    accelerator = Accelerator(Acceleration(quantization))
    for name in names:
        accelerator.pack_weight(model, name)
    accelerator.finish(model)
