"""The tensors of a whole model: their names and shapes, how ranks divide them, and how they lie in files.

Knows sizes; knows no file format. A tensor is named as Meta names it, whatever the files call it.
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
New = Callable[[Sequence[int], torch.dtype], Tensor]  # makes the tensor that moved numbers are written to

# The dimension along which fairscale divides each matrix over ranks. What isn't here is whole on every rank.
SPLIT_DIM = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
# Beside such a matrix, what is whole on every rank where that is divided along this dimension.
WHOLE = {"bias": 1, "lora_A": 0, "lora_B": 1}
COMPARED_ROWS, SAMPLED_ROWS = 1024, 64  # of two matrices: at a time, and in all where that shall do
MOST_LAYERS, MOST_HEADS = 10_000, 100_000  # beyond, sizes would be computed for hours


def tensor_shapes(args: ModelArgs) -> Shapes:
    """Every tensor of the whole model, in the order in which the data meets them; a tied output layer has none."""
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
    """Raise LlamaError, naming the numbers, for sizes that make no network on any number of ranks."""
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
    """Along which dimension the tensor `name` is divided over ranks; None: every rank holds all of it."""
    stem, _, kind = name.rpartition(".")
    dim = SPLIT_DIM.get(stem.rpartition(".")[2])
    return None if dim == WHOLE.get(kind) else dim


def parts(name: str, args: ModelArgs, mp_size: int) -> int:
    """Into how many different parts `mp_size` ranks divide the tensor: fewer where ranks share a key/value head."""
    if split_dim(name) is None:
        return 1
    return min(mp_size, args.kv_heads) if name.rpartition(".")[0].endswith(("wk", "wv")) else mp_size


def shared_over(name: str, args: ModelArgs, mp_size: int) -> int:
    """How many neighbouring ranks hold one divided part alike: 1, but where they share a key/value head.

    Each has gradients from its own queries alone, so that those of a parameter must be summed over these ranks.
    """
    return 1 if split_dim(name) is None else mp_size // parts(name, args, mp_size)


def part_sizes(args: ModelArgs, mp_size: int) -> dict[str, int]:
    """How many numbers of each tensor one rank holds."""
    return {n: torch.Size(shape).numel() // parts(n, args, mp_size) for n, shape in tensor_shapes(args).items()}


def mp_sizes(args: ModelArgs, group: int = 1) -> list[int]:
    """On how many model-parallel ranks these sizes run, where ranks divide no group of so many numbers of a row."""

    def runs(m: int) -> bool:
        together = args.kv_heads % m == 0 or m % args.kv_heads == 0
        whole_groups = not any(columns % (m * group) for columns in (args.n_heads * args.head_size, args.hidden_dim))
        return together and whole_groups and not any(count % m for count in (args.n_heads, args.vocab_size))

    return [m for m in range(1, args.n_heads + 1) if runs(m)]


def is_linear(name: str) -> bool:
    """Whether the tensor is the matrix of a linear layer."""
    return name.endswith(".weight") and split_dim(name) is not None and not name.startswith("tok_embeddings")


def is_multiplied(name: str, args: ModelArgs) -> bool:
    """Whether the tensor is a matrix that every token is multiplied by; the embedding is only where it is tied."""
    return is_linear(name) or (args.tied_embeddings and name == "tok_embeddings.weight")


def memory_needed(args: ModelArgs, mp_size: int, dtype: torch.dtype, bits: float | None = None) -> tuple[int, int]:
    """Bytes that one model-parallel rank takes for (weights, KV cache).

    bits: of a number of the matrices that are multiplied; None: as many as the dtype has.
    """
    sizes = part_sizes(args, mp_size)
    multiplied = sum(size for name, size in sizes.items() if is_multiplied(name, args))
    share = 1 if bits is None else bits / (8 * dtype.itemsize)
    weights = sum(sizes.values()) - multiplied + int(multiplied * share)
    heads = max(args.kv_heads // mp_size, 1)
    cache = 2 * args.n_layers * args.max_batch_size * args.max_seq_len * heads * args.head_size
    return weights * dtype.itemsize, cache * dtype.itemsize


def in_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def permute_rotary(x: Tensor, head_dim: int, to: Literal["meta", "hf"], new: New = in_memory) -> Tensor:
    """The rows of x, (heads * head_dim, ...), from one order of rotary pairs to the other, in a `new` tensor.

    In Meta's layout the two rows that turn together are neighbours, 2j and 2j + 1; in Hugging Face's they are half a
    head apart, j and j + head_dim / 2. Heads are permuted one by one, so n_heads of them (q: weight, bias, norm) and
    n_kv_heads (k) are each right by themselves, and so is any slice of whole heads.
    """
    pairs = (2, head_dim // 2) if to == "meta" else (head_dim // 2, 2)
    moved = x.unflatten(0, (-1, *pairs)).transpose(1, 2)
    return new(x.shape, x.dtype).view(moved.shape).copy_(moved).flatten(0, 2)


def is_rotary(name: str) -> bool:
    """Whether the rows of the tensor are rotated by position, so that their order is one of two."""
    return name.rpartition(".")[0].endswith(("wq", "wk", "q_norm", "k_norm"))


@dataclass(frozen=True)
class Stored:
    """A whole tensor as it lies in files: mapped pieces, side by side along `dim`.

    name: as the files spell it. halves: the head_dim of rows in Hugging Face's rotary order; None: they aren't.
    """

    name: str
    pieces: tuple[Tensor, ...]
    dim: int = 0
    halves: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        if shape:
            shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def read(self, dim: int = 0, start: int = 0, stop: int | None = None, new: New = in_memory) -> Tensor:
        """Rows or columns start..stop, in Meta's layout: a view of the file, or `new` where they have to be moved."""
        stop = self.shape[dim] if stop is None else stop
        if dim == self.dim:
            found = list(self._overlaps(start, stop))
        else:
            found = [piece.narrow(dim, start, stop - start) for piece in self.pieces]
        joined = found[0]
        if len(found) > 1:
            shape = [*joined.shape]
            shape[self.dim] = sum(piece.shape[self.dim] for piece in found)
            joined = torch.cat(found, self.dim, out=new(shape, self.dtype))
        return joined if self.halves is None else permute_rotary(joined, self.halves, "meta", new)

    def _overlaps(self, start: int, stop: int) -> Iterator[Tensor]:
        before = 0
        for piece in self.pieces:
            size = piece.shape[self.dim]
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                yield piece.narrow(self.dim, first, last - first)
            before += size

    def part(self, args: ModelArgs, mp_rank: int, mp_size: int, name: str, new: New = in_memory) -> Tensor:
        """What one model-parallel rank keeps of this tensor, whose name in the model is `name`."""
        dim, count = split_dim(name), parts(name, args, mp_size)
        if dim is None:
            return self.read(new=new)
        size = self.shape[dim] // count
        start = mp_rank * count // mp_size * size
        return self.read(dim, start, start + size, new)


def repeats(a: Tensor, b: Tensor, thorough: bool) -> bool:
    """Whether two matrices are equal bit for bit, in all rows or in some; ends at the first that differ."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.ndim == 0:
        return False
    count = COMPARED_ROWS if thorough else 1
    starts = range(0, len(a), count if thorough else max(len(a) // SAMPLED_ROWS, 1))
    return all(torch.equal(*(x[i : i + count].contiguous().view(torch.uint8) for x in (a, b))) for i in starts)
