"""The fast form of a built model: layers for inference in the place of fairscale's, with the same shards and names.

Knows layers and kernels; knows no files and no generation. Where there are no kernels, and on a GPU unless they are
rounded, matrices stay as they are.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group, get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from ..errors import LlamaError
from ..model import Attention, FeedForward, RMSNorm, StartPos, Transformer, TransformerBlock
from .cuda_graphs import make_steps
from .kernels import dispatch as kernels
from .memory_pages import trim
from .quantization import BITS, FloatPanels, IntegerPanels, Panels, Quantization
from .shared_memory import Meeting, arrange

ALL = 1 << 60  # positions of a window that has no end


class PackedLinear(nn.Module):
    """x W^T + b by this rank's part of W, packed; then what the layer that it replaces does over ranks.

    `weight` and the state dict have W itself, unpacked anew each time. `train()` makes W a parameter again, with its
    gradients, and `eval()` packs it. Packed, gradients flow through W to x, and to b.
    """

    def __init__(
        self,
        layer: ColumnParallelLinear | RowParallelLinear,
        pack: Callable[[Tensor], Panels | None],
        panels: Panels | None = None,
    ):
        """panels: W, where that isn't in the layer."""
        super().__init__()
        self.by_rows = isinstance(layer, ColumnParallelLinear)
        self.gathers = isinstance(layer, ColumnParallelLinear) and layer.gather_output
        self.alone = get_model_parallel_world_size() == 1
        self.rows = len(layer.weight)
        self.bias = layer.bias
        self.pack = pack
        self.meeting: Meeting | None = None
        self.panels: Panels | None = pack(layer.weight.detach()) if panels is None else panels
        if self.panels is None:
            self.weight = layer.weight
        self.training = False

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.panels is not None:
            return self.panels.unpacked()
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> "PackedLinear":
        if mode and self.panels is not None:
            weight, self.panels = self.panels.unpacked(), None
            self.weight = nn.Parameter(weight)
        elif not mode and self.panels is None:
            self.panels = self.pack(self.weight.detach())
            if self.panels is not None:
                del self.weight
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """To another dtype or device, where the matrix is packed anew, or can't be."""
        packed, self.panels = self.panels, None
        super()._apply(fn, recurse)
        if packed is not None:
            weight = fn(packed.unpacked())
            self.panels = self.pack(weight)
            if self.panels is None:
                self.weight = nn.Parameter(weight)
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        if self.panels is not None:
            loaded_elsewhere(prefix + "weight", state, *rest)
            own = self.panels.unpacked()
            weight = state.get(prefix + "weight", own)
            if weight.shape == own.shape:
                self.panels = self.pack(weight.to(own))
            else:
                rest[-1].append(f"size mismatch for {prefix}weight: {tuple(weight.shape)} is not {tuple(own.shape)}")

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., columns of W on this rank) -> (..., rows of W, on this rank or in all)."""
        if self.alone:
            return self.product(x, self.bias)
        if self.by_rows:
            y = self.product(copy_to_model_parallel_region(x) if torch.is_grad_enabled() else x, self.bias)
            return gathered(y, self.meeting) if self.gathers else y
        y = summed(self.product(x, None), self.meeting)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.panels is None or (torch.is_grad_enabled() and (x.requires_grad or bias is not None)):
            return F.linear(x, self.weight, bias)
        y = self.panels.product(x)
        return y if bias is None else y + bias

    def lookup(self, rows: Tensor) -> Tensor:
        """Those rows of W: (...) -> (..., columns)."""
        return F.embedding(rows, self.weight) if self.panels is None else self.panels.lookup(rows)


class FastAttention(Attention):
    """Attention over the cache as one kernel, where there is one for so many tokens: rotated, cached and looked at.

    Each row reads the positions that it has, whatever the longest row has. window: how many of them; None: all.
    """

    window: int | None

    def attend(
        self, xq: Tensor, xk: Tensor, xv: Tensor, start_pos: StartPos | None, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        bsz, seqlen, _, head_dim = xq.shape
        if start_pos is None or not kernels.attends(xq, seqlen):
            return super().attend(xq, xk, xv, start_pos, freqs_cis, mask)
        cache_k, cache_v = self.caches(xk)
        angles = torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis
        angles = angles.reshape(-1, seqlen, head_dim)  # (1 or B, T, D)
        starts = torch.full((bsz,), start_pos, device=xq.device) if isinstance(start_pos, int) else start_pos
        return kernels.attention(xq, xk, xv, cache_k, cache_v, angles, starts, self.window or ALL)


class FastTransformer(Transformer):
    """A model in which each layer's attention is FastAttention's kernel, which needs no mask."""

    def masks(
        self, start_pos: StartPos | None, positions: Tensor, first: int, last: int
    ) -> tuple[Tensor | None, Tensor | None]:
        if start_pos is None or not kernels.attends(self.norm.weight, positions.shape[-1]):
            return super().masks(start_pos, positions, first, last)
        return None, None


def for_kernels(x: Tensor) -> bool:
    """Whether kernels, which have no gradients, may compute with x."""
    return kernels.takes(x) and not torch.is_grad_enabled()


class FastNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps) if for_kernels(x) else super().forward(x)


class FastFeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(kernels.swiglu(self.w1(x), self.w3(x))) if for_kernels(x) else super().forward(x)


class PackedEmbedding(nn.Module):
    """The embedding of a model whose output layer is the same matrix: rows of what that layer has packed."""

    def __init__(self, layer: VocabParallelEmbedding, output: PackedLinear):
        super().__init__()
        self.first = layer.vocab_start_index
        self._output = (output,)  # in a tuple: no module of this one
        self.training = False

    def __getattr__(self, name: str) -> Any:
        return self._output[0].weight if name == "weight" else super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        loaded_elsewhere(prefix + "weight", state, *rest)  # by the output layer

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) -> (B, T, dim)."""
        output = self._output[0]
        return looked_up(tokens, output.lookup, self.first, output.rows, output.meeting)


class FastEmbedding(VocabParallelEmbedding):
    meeting: Meeting | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) -> (B, T, dim)."""
        return looked_up(tokens, self.lookup, self.vocab_start_index, len(self.weight), self.meeting)

    def lookup(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)


def looked_up(
    tokens: Tensor, lookup: Callable[[Tensor], Tensor], first: int, count: int, meeting: Meeting | None
) -> Tensor:
    """Rows of a matrix of which this rank has `count`, from `first` on; zeros for those that no rank has."""
    own = tokens - first
    here = (own >= 0) & (own < count)
    rows = lookup(own.where(here, 0)) * here[..., None]
    return rows if get_model_parallel_world_size() == 1 else summed(rows, meeting)


def loaded_elsewhere(
    key: str,
    state: dict[str, Tensor],
    _: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    *rest: object,
) -> None:
    """Tell torch's loading of a state that a tensor which isn't a parameter here has its use."""
    if key in unexpected:
        unexpected.remove(key)
    if strict and key not in state:
        missing.append(key)


def can_meet(x: Tensor) -> bool:
    """Whether ranks may exchange x where they meet: outside of what is compiled."""
    return kernels.takes(x) and not torch.compiler.is_compiling()


def summed(x: Tensor, meeting: Meeting | None) -> Tensor:
    """The sum of what the ranks have; without gradients in place, and so that it can be traced."""
    if torch.is_grad_enabled():
        return reduce_from_model_parallel_region(x)
    if meeting is not None and can_meet(x):
        return meeting.sum(x)
    dist.all_reduce(x, group=get_model_parallel_group())
    return x


def gathered(x: Tensor, meeting: Meeting | None) -> Tensor:
    """What the ranks have, side by side: (..., N) -> (..., ranks x N)."""
    if torch.is_grad_enabled():
        return gather_from_model_parallel_region(x)
    if meeting is not None and can_meet(x):
        return meeting.gather(x)
    parts = [torch.empty_like(x) for _ in range(get_model_parallel_world_size())]
    dist.all_gather(parts, x, group=get_model_parallel_group())
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Form:
    """What becomes of a model as it is loaded: `take` goes to whoever loads it, `finish` comes after.

    quantization: None keeps the matrices as they are. compile: see `graphs.make_steps`.
    Raises LlamaError for what isn't known or can't be had.
    """

    quantization: Quantization | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.compile and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise LlamaError("compile=True needs a C++ compiler, and none is here: install g++ or leave compile out")
        if self.quantization is not None and self.quantization not in BITS:
            raise LlamaError(f"quantization is {self.quantization!r}, expected None or one of {', '.join(BITS)}")

    def take(self, model: Transformer, name: str, panels: IntegerPanels | None = None) -> None:
        """Give the layer whose tensor `name` was just loaded its fast form, before the next one is.

        panels: of a matrix that was stored rounded, as this form rounds them.
        """
        owner_name, _, kind = name.rpartition(".")
        layer = model.get_submodule(owner_name)
        if kind != "weight":
            return
        trim()  # what the tensor before this one was made from
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            model.set_submodule(owner_name, PackedLinear(layer, self._pack, panels))
        elif isinstance(layer, VocabParallelEmbedding) and model.params.tied_embeddings:
            model.output = PackedLinear(model.output, self._pack)
            model.tok_embeddings = PackedEmbedding(layer, model.output)
        elif isinstance(layer, VocabParallelEmbedding):
            layer.__class__ = FastEmbedding

    def finish(self, model: Transformer) -> None:
        """What is left to do when all tensors have come."""
        if kernels.available(model.norm.weight):
            kernels.register()
            whole_vectors = model.params.head_size % kernels.LANES == 0
            if whole_vectors:
                model.__class__ = FastTransformer
            for layer in model.modules():
                if isinstance(layer, TransformerBlock) and whole_vectors:
                    layer.attention.__class__ = FastAttention
                    cast(FastAttention, layer.attention).window = layer.window
                elif type(layer) in FASTER:
                    layer.__class__ = FASTER[type(layer)]
        meeting = arrange() if next(model.parameters()).device.type == "cpu" else None
        for layer in model.modules():
            if isinstance(layer, PackedLinear | FastEmbedding):
                layer.meeting = meeting
        model.eval()  # which packed layers are
        make_steps(model, isinstance(model, FastTransformer), self.compile)

    def _pack(self, weight: Tensor) -> Panels | None:
        if self.quantization is not None:
            return IntegerPanels(weight, BITS[self.quantization])
        return FloatPanels(weight) if kernels.fit(weight) else None


FASTER: dict[type[nn.Module], type[nn.Module]] = {RMSNorm: FastNorm, FeedForward: FastFeedForward}
