"""The schema of a model's tensors: names, shapes, how ranks divide them, what memory they take, how they are stored.

Knows sizes; knows no file format. Tensors have Meta's names here, whatever the files call them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import LlamaError
from ..model import ModelArgs, divide
from ..rotary import LARGEST

Shapes = dict[str, tuple[int, ...]]  # by the names of tensors
New = Callable[[Sequence[int], torch.dtype], Tensor]  # allocates a tensor, for numbers that have to be moved

# The dimension along which fairscale divides each matrix over ranks. Tensors that aren't here are whole on every rank.
SPLIT_DIM = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
# Other tensors of those modules: each is whole on every rank if the matrix is divided along this dimension.
WHOLE = {"bias": 1, "lora_A": 0, "lora_B": 1, "lora_magnitude": 1, "lora_bias": 1}
COMPARED_ROWS = 1024  # rows of two matrices that are compared at a time
SAMPLED_ROWS = 64  # rows that are compared at all, where a sample is enough
MOST_LAYERS, MOST_HEADS = 10_000, 100_000  # more is a wrong configuration, whose sizes would take hours to compute


def tensor_shapes(args: ModelArgs) -> Shapes:
    """All tensors of the whole model, in the order of a forward pass. A tied output layer has none."""
    dim, q, kv, hidden = args.dim, args.n_heads * args.head_size, args.kv_heads * args.head_size, args.hidden_dim
    layer: Shapes = {"attention_norm.weight": (dim,)}
    for name, rows, columns, bias in (
        ("attention.wq", q, dim, args.qkv_bias),
        ("attention.wk", kv, dim, args.qkv_bias),
        ("attention.wv", kv, dim, args.qkv_bias),
        ("attention.wo", dim, q, args.wo_bias),
        ("feed_forward.w1", hidden, dim, args.mlp_bias),
        ("feed_forward.w2", dim, hidden, args.mlp_bias),
        ("feed_forward.w3", hidden, dim, args.mlp_bias),
    ):
        layer[f"{name}.weight"] = (rows, columns)
        if bias:
            layer[f"{name}.bias"] = (rows,)
    if args.qk_norm:
        layer |= {"attention.q_norm.weight": (args.head_size,), "attention.k_norm.weight": (args.head_size,)}
    layer["ffn_norm.weight"] = (dim,)
    shapes: Shapes = {"tok_embeddings.weight": (args.vocab_size, dim)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(args.n_layers) for name, shape in layer.items()}
    shapes["norm.weight"] = (dim,)
    return shapes if args.tied_embeddings else {**shapes, "output.weight": (args.vocab_size, dim)}


def check_sizes(args: ModelArgs) -> None:
    """Raise LlamaError, naming the numbers, for sizes that no network can have on any number of ranks."""
    if args.head_dim is None:
        divide("dim", args.dim, "n_heads", args.n_heads)
    divide("head_dim", args.head_size, "the size of a rotary pair", 2)
    divide("n_heads", args.n_heads, "n_kv_heads", args.kv_heads)
    if args.n_layers > MOST_LAYERS or args.n_heads > MOST_HEADS or args.hidden_dim >= LARGEST:
        raise LlamaError(
            f"{args.n_layers} layers, {args.n_heads} heads, hidden_dim {args.hidden_dim}: that is no model"
        )
    if wrong := [layer for layer in args.sliding_layers or () if layer >= args.n_layers]:
        raise LlamaError(f"sliding_layers has {wrong[0]}, but n_layers is {args.n_layers}: layers are counted from 0")


def split_dim(name: str) -> int | None:
    """The dimension along which the tensor is divided over ranks; None: every rank holds all of it."""
    stem, _, kind = name.rpartition(".")
    dim = SPLIT_DIM.get(stem.rpartition(".")[2])
    return None if dim == WHOLE.get(kind) else dim


def count_parts(name: str, args: ModelArgs, mp_size: int) -> int:
    """Into how many different parts the tensor is divided: `mp_size`, or fewer where ranks share a key/value head."""
    if split_dim(name) is None:
        return 1
    return min(mp_size, args.kv_heads) if name.rpartition(".")[0].endswith(("wk", "wv")) else mp_size


def ranks_per_part(name: str, args: ModelArgs, mp_size: int) -> int:
    """How many neighbouring ranks hold the same part of a divided tensor: 1, or more where they share a key/value head.

    Each of them has the gradients of its own queries only, so a parameter's gradients must be summed over these ranks.
    """
    return 1 if split_dim(name) is None else mp_size // count_parts(name, args, mp_size)


def part_sizes(args: ModelArgs, mp_size: int) -> dict[str, int]:
    """How many numbers of each tensor one rank holds."""
    return {n: torch.Size(shape).numel() // count_parts(n, args, mp_size) for n, shape in tensor_shapes(args).items()}


def mp_sizes(args: ModelArgs, group: int = 1) -> list[int]:
    """The numbers of model-parallel ranks on which these sizes run.

    group: how many neighbouring numbers of a row share a scale, so that ranks can't divide them.
    """

    def runs(m: int) -> bool:
        heads_fit = args.kv_heads % m == 0 or m % args.kv_heads == 0
        groups_fit = not any(columns % (m * group) for columns in (args.n_heads * args.head_size, args.hidden_dim))
        return heads_fit and groups_fit and not any(count % m for count in (args.n_heads, args.vocab_size))

    return [m for m in range(1, args.n_heads + 1) if runs(m)]


def is_linear(name: str) -> bool:
    """Whether the tensor is the matrix of a linear layer."""
    return name.endswith(".weight") and split_dim(name) is not None and not name.startswith("tok_embeddings")


def is_multiplied(name: str, args: ModelArgs) -> bool:
    """Whether every token is multiplied by this matrix: a linear layer's, or an embedding that is the output too."""
    return is_linear(name) or (args.tied_embeddings and name == "tok_embeddings.weight")


def memory_needed(args: ModelArgs, mp_size: int, dtype: torch.dtype, bits: float | None = None) -> tuple[int, int]:
    """Bytes that one model-parallel rank takes for (weights, KV cache).

    bits: per number of a quantized matrix, with its share of the scales; None: matrices aren't quantized.
    """
    sizes = part_sizes(args, mp_size)
    multiplied = sum(size for name, size in sizes.items() if is_multiplied(name, args))
    share = 1 if bits is None else bits / (8 * dtype.itemsize)
    weights = sum(sizes.values()) - multiplied + int(multiplied * share)
    heads = max(args.kv_heads // mp_size, 1)
    cache = 2 * args.n_layers * args.max_batch_size * args.max_seq_len * heads * args.head_size
    return weights * dtype.itemsize, cache * dtype.itemsize


def allocate_in_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def permute_rotary(x: Tensor, head_dim: int, to: Literal["meta", "hf"], new: New = allocate_in_memory) -> Tensor:
    """Permute the rows of x, (heads * head_dim, ...), from one order of rotary pairs to the other, in a `new` tensor.

    In Meta's layout the two rows of a pair are neighbours, 2j and 2j + 1; in Hugging Face's they are half a head apart,
    j and j + head_dim / 2. Heads are permuted one by one, so x may be all heads or any slice of whole heads.
    """
    pairs = (2, head_dim // 2) if to == "meta" else (head_dim // 2, 2)
    moved = x.unflatten(0, (-1, *pairs)).transpose(1, 2)
    return new(x.shape, x.dtype).view(moved.shape).copy_(moved).flatten(0, 2)


def is_rotary(name: str) -> bool:
    """Whether the rows of the tensor are rotary pairs, so that they have one of the two orders of `permute_rotary`."""
    return name.rpartition(".")[0].endswith(("wq", "wk", "q_norm", "k_norm"))


@dataclass(frozen=True)
class Stored:
    """A whole tensor in files, in one piece or several."""

    name: str  # in the files
    pieces: tuple[Tensor, ...]  # mapped, in their order along `dim`
    dim: int = 0
    hf_head_dim: int | None = None  # the head_dim, if rows are in Hugging Face's rotary order; None: they aren't

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        if shape:
            shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def read(self, dim: int = 0, start: int = 0, stop: int | None = None, new: New = allocate_in_memory) -> Tensor:
        """Rows or columns start..stop, in Meta's layout: a view of the file, or `new` where they have to be moved."""
        stop = self.shape[dim] if stop is None else stop
        if dim == self.dim:
            pieces = list(self._cut_pieces(start, stop))
        else:
            pieces = [piece.narrow(dim, start, stop - start) for piece in self.pieces]
        joined = pieces[0]
        if len(pieces) > 1:
            shape = [*joined.shape]
            shape[self.dim] = sum(piece.shape[self.dim] for piece in pieces)
            joined = torch.cat(pieces, self.dim, out=new(shape, self.dtype))
        return joined if self.hf_head_dim is None else permute_rotary(joined, self.hf_head_dim, "meta", new)

    def _cut_pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """What is between start and stop along `dim`, of each piece."""
        before = 0
        for piece in self.pieces:
            size = piece.shape[self.dim]
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                yield piece.narrow(self.dim, first, last - first)
            before += size

    def part(self, args: ModelArgs, mp_rank: int, mp_size: int, name: str, new: New = allocate_in_memory) -> Tensor:
        """One model-parallel rank's part of this tensor, whose name in the model is `name`."""
        dim, count = split_dim(name), count_parts(name, args, mp_size)
        if dim is None:
            return self.read(new=new)
        size = self.shape[dim] // count
        start = mp_rank * count // mp_size * size
        return self.read(dim, start, start + size, new)


def are_equal(a: Tensor, b: Tensor, thorough: bool) -> bool:
    """Whether two matrices are equal bit for bit. thorough: compare all rows instead of a sample."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.ndim == 0:
        return False
    count = COMPARED_ROWS if thorough else 1
    starts = range(0, len(a), count if thorough else max(len(a) // SAMPLED_ROWS, 1))
    return all(torch.equal(*(x[i : i + count].contiguous().view(torch.uint8) for x in (a, b))) for i in starts)
