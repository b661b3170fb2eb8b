"""The network of the fast form: the same layers as functions on packed matrices, kernels and shared memory.

It reads the parts of a built model: sizes, norms, biases, KV caches, and the packed matrices that stand in them. Knows
layers and kernels; knows no files and no generation. Without kernels a matrix, norm or attention is the model's.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group, get_model_parallel_world_size
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from .._util.slots import Caches, Slots
from ..kv_cache import StartPos
from ..model import Attention, RMSNorm, Transformer, TransformerBlock
from .kernels import cpu, dispatch
from .plain_weights import LazyParameters, PackedWeight
from .quantization import FloatMatrix
from .shared_memory import SharedMemory

NO_WINDOW = 1 << 60  # positions that a query sees in a layer without a window

RunBlock = Callable[["FastBlock", Tensor, StartPos | None, Tensor, Tensor | None, Caches | None], Tensor]


def packed_weight(layer: nn.Module) -> PackedWeight | None:
    """What stands for the layer's weight, if that is packed."""
    parameters = layer._parameters
    return parameters.packed("weight") if isinstance(parameters, LazyParameters) else None


def own_memory(layer: nn.Module, name: str) -> Tensor | None:
    """The parameter's memory. The Parameter is held by its layer alone, so that other holders can be counted."""
    value = layer._parameters[name]
    return None if value is None else value.detach()


class FastLinear:
    """x W^T + b by this rank's part of W; then the exchange between ranks that the model's layer makes."""

    def __init__(self, layer: ColumnParallelLinear | RowParallelLinear, shared: SharedMemory | None):
        self.is_column_parallel = isinstance(layer, ColumnParallelLinear)
        self.gathers = isinstance(layer, ColumnParallelLinear) and layer.gather_output
        self.alone = get_model_parallel_world_size() == 1
        self.weight = packed_weight(layer)
        self.plain: Tensor | None = own_memory(layer, "weight") if self.weight is None else None
        self.bias = own_memory(layer, "bias")
        self.shared = shared

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes if self.plain is not None else self.weight.packed.nbytes  # type: ignore[union-attr]

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., columns of W on this rank) -> (..., rows of W, on this rank or in all)."""
        if self.alone:
            return self.product(x, self.bias)
        if self.is_column_parallel:
            y = self.product(x, self.bias)
            return all_gather(y, self.shared) if self.gathers else y
        y = all_reduce(self.product(x), self.shared)
        return y if self.bias is None else add(y, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.plain is not None:
            return F.linear(x, self.plain, bias)
        y = self.weight.packed.product(x)  # type: ignore[union-attr]
        return y if bias is None else add(y, bias)


class FastEmbedding:
    """Rows of the embedding, of which this rank has some; of the packed output layer where both are one matrix."""

    def __init__(self, layer: VocabParallelEmbedding, shared: SharedMemory | None):
        self.first, self.rows = layer.vocab_start_index, layer.vocab_end_index - layer.vocab_start_index
        self.columns = layer.embedding_dim
        self.alone = get_model_parallel_world_size() == 1
        self.weight = packed_weight(layer)
        self.plain: Tensor | None = own_memory(layer, "weight") if self.weight is None else None
        self.shared = shared

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) -> (B, T, dim). Zeros for those that no rank has."""
        h = self.rows_of(tokens)
        return h if self.alone else all_reduce(h, self.shared)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """The rows of tokens that this rank has, and zeros for the others."""
        packed = None if self.weight is None else self.weight.packed
        matrix = packed.packed if isinstance(packed, FloatMatrix) else self.plain
        if matrix is not None and matrix.is_contiguous() and dispatch.runs_on_cpu(matrix):
            return cpu.embed(tokens, matrix, self.rows, self.columns, self.first)
        own = tokens - self.first
        is_here = (own >= 0) & (own < self.rows)
        rows = own.where(is_here, 0)
        h = F.embedding(rows, cast(Tensor, self.plain)) if packed is None else packed.lookup(rows)
        return h * is_here[..., None]


class FastNorm:
    """`model.RMSNorm`, or the identity that a layer has instead."""

    def __init__(self, layer: nn.Module, kernels: bool):
        self.layer: Any = layer
        self.kernels = kernels and isinstance(layer, RMSNorm)
        self.weight = own_memory(layer, "weight") if self.kernels else None
        self.eps = cast(float, layer.eps) if self.kernels else 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None or not dispatch.can_compute(x):
            return self.layer(x)
        return dispatch.rms_norm(x, self.weight, self.eps)


class FastBlock:
    """The parts of a TransformerBlock."""

    def __init__(self, layer: TransformerBlock, kernels: bool, shared: SharedMemory | None):
        self.attention = cast(Attention, layer.attention)
        self.window = layer.window
        self.kernels = kernels
        heads = self.attention.n_local_heads, self.attention.n_local_kv_heads, self.attention.head_dim
        itemsize = cast(Tensor, own_memory(layer.ffn_norm, "weight")).itemsize
        self.attends = kernels and cpu.attends(*heads, itemsize)  # whether there is a kernel for such heads
        parts = {**self.attention._modules, **layer.feed_forward._modules}
        linear: dict[str, Any] = {
            name: FastLinear(cast(Any, part), shared) for name, part in parts.items() if name.startswith("w")
        }
        self.wq, self.wk, self.wv, self.wo = (linear[name] for name in ("wq", "wk", "wv", "wo"))
        self.w1, self.w2, self.w3 = (linear[name] for name in ("w1", "w2", "w3"))
        self.q_norm, self.k_norm = (FastNorm(cast(nn.Module, parts[name]), kernels) for name in ("q_norm", "k_norm"))
        self.attention_norm, self.ffn_norm = FastNorm(layer.attention_norm, kernels), FastNorm(layer.ffn_norm, kernels)


def run_block(
    block: FastBlock,
    x: Tensor,
    start_pos: StartPos | None,
    freqs_cis: Tensor,
    mask: Tensor | None,
    caches: Caches | None,
) -> Tensor:
    """As `TransformerBlock.forward`. freqs_cis: complex, or the same numbers as pairs of real ones."""
    attended = run_attention(block, block.attention_norm(x), start_pos, freqs_cis, mask, caches)
    h = add(x, attended)
    return add(h, run_feed_forward(block, block.ffn_norm(h)))


def run_attention(
    block: FastBlock,
    x: Tensor,
    start_pos: StartPos | None,
    freqs_cis: Tensor,
    mask: Tensor | None,
    caches: Caches | None,
) -> Tensor:
    """As `Attention.forward`. With a kernel, each row reads the positions that it has, and no mask is needed."""
    layer, (bsz, seqlen, _) = block.attention, x.shape
    xq = block.q_norm(block.wq(x).view(bsz, seqlen, layer.n_local_heads, layer.head_dim))  # (B, T, H, D)
    xk = block.k_norm(block.wk(x).view(bsz, seqlen, layer.n_local_kv_heads, layer.head_dim))  # (B, T, KV, D)
    xv = block.wv(x).view(bsz, seqlen, layer.n_local_kv_heads, layer.head_dim)  # (B, T, KV, D)
    if start_pos is None or caches is None or not block.attends or not dispatch.can_attend(xq, seqlen):
        output = layer.attend(xq, xk, xv, start_pos, freqs_cis, mask, caches)
    else:
        angles = torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis
        angles = angles.reshape(-1, seqlen, layer.head_dim)  # (1 or B, T, D)
        starts = torch.full((bsz,), start_pos, device=x.device) if isinstance(start_pos, int) else start_pos
        keys, values, rows = caches
        output = dispatch.attention(xq, xk, xv, keys, values, angles, starts, block.window or NO_WINDOW, rows)
    return block.wo(output.reshape(bsz, seqlen, -1))  # (B, T, dim)


def run_feed_forward(block: FastBlock, x: Tensor) -> Tensor:
    """As `FeedForward.forward`."""
    gate, up = block.w1(x), block.w3(x)
    return block.w2(dispatch.swiglu(gate, up) if block.kernels and dispatch.can_compute(x) else F.silu(gate) * up)


class FastNetwork:
    """The parts of a Transformer, in the order in which data meets them."""

    def __init__(self, model: Transformer, shared: SharedMemory | None):
        modules: dict[str, Any] = dict(dict.items(model._modules))
        self.like = cast(Tensor, own_memory(modules["norm"], "weight"))  # of the model's dtype and device
        self.kernels = dispatch.is_available(self.like)
        self.embed = FastEmbedding(modules["tok_embeddings"], shared)
        self.blocks = [FastBlock(layer, self.kernels, shared) for layer in modules["layers"]]
        self.norm = FastNorm(modules["norm"], self.kernels)
        output = modules["output"]  # not linear in a model without an output layer, where it refuses to be called
        self.output = FastLinear(output, shared) if isinstance(output, ColumnParallelLinear) else output

    @property
    def attends(self) -> bool:
        """Whether attention is a kernel, which needs no mask."""
        return self.blocks[0].attends if self.blocks else False

    @property
    def linears(self) -> list[tuple[str, FastLinear]]:
        """The linear layers of all blocks, by the last part of their names."""
        names = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
        return [(name, getattr(block, name)) for block in self.blocks for name in names]

    def find_caches(self, attention: Attention, slots: Slots | None) -> Caches:
        return (*attention.caches(self.like), None) if slots is None else slots.caches(attention, self.like)

    def run(
        self,
        tokens: Tensor,
        start_pos: StartPos | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        window_mask: Tensor | None,
        run_block: RunBlock = run_block,
        hidden: list[Tensor] | None = None,
        slots: Slots | None = None,
    ) -> Tensor:
        """As `Transformer.run`: tokens (B, T) -> (B, T, dim), normed. slots: None: those of calls by hand."""
        h = self.embed(tokens)
        for block in self.blocks:
            if hidden is not None:
                hidden.append(h)
            caches = None if start_pos is None else self.find_caches(block.attention, slots)
            h = run_block(block, h, start_pos, freqs_cis, mask if block.window is None else window_mask, caches)
        h = self.norm(h)
        if hidden is not None:
            hidden.append(h)
        return h


def add(x: Tensor, y: Tensor) -> Tensor:
    """x (..., N) + y, of the same shape or (N)."""
    if x.dtype == y.dtype and dispatch.runs_on_cpu(x):
        return cpu.add(x, y)
    return x + y


def can_share(x: Tensor) -> bool:
    """Whether ranks may exchange x through shared memory: outside of what is compiled."""
    return dispatch.can_compute(x) and not torch.compiler.is_compiling()


def all_reduce(x: Tensor, shared: SharedMemory | None) -> Tensor:
    """The sum of what the ranks have; in place, so that it can be captured."""
    if shared is not None and can_share(x):
        return shared.all_reduce(x)
    dist.all_reduce(x, group=get_model_parallel_group())
    return x


def all_gather(x: Tensor, shared: SharedMemory | None) -> Tensor:
    """What the ranks have, side by side: (..., N) -> (..., ranks x N)."""
    if shared is not None and can_share(x):
        return shared.all_gather(x)
    parts = [torch.empty_like(x) for _ in range(get_model_parallel_world_size())]
    dist.all_gather(parts, x, group=get_model_parallel_group())
    return torch.cat(parts, dim=-1)
