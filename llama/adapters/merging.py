"""What an adapter makes of the base's tensors: computed block by block when they are read, at the door of a checkpoint.

So a base with an adapter is a checkpoint like others: it is loaded, packed, quantized, divided over ranks and written
as they are. Knows matrices, names and shapes; knows no module of a network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.compressed_tensors import SCALES, SHAPE, WORDS
from ..checkpoints.schema import New, Stored, allocate_in_memory, is_linear, tensor_shapes
from ..errors import LlamaError
from ..model import ModelArgs
from .peft_config import Start
from .reading import EMBEDDING, MATRICES, OUTPUT, Adapter

ROWS = 1024  # of a matrix that are computed at a time
BIASES = {"wq": "qkv_bias", "wk": "qkv_bias", "wv": "qkv_bias", "wo": "wo_bias"}  # others': mlp_bias
# (start, stop) -> these rows of a tensor, in float32 and Meta's layout. Reads what it needs at the first call.
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class AdaptedTensor(Stored):
    """A tensor of the base that an adapter changes."""

    whole_shape: tuple[int, ...] = field(kw_only=True)
    result_dtype: torch.dtype = field(kw_only=True)
    step: int = field(kw_only=True)  # rows that are computed at a time
    open_rows: Callable[[], Rows] = field(kw_only=True)  # called for each read, so that nothing is held between two

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole_shape

    @property
    def dtype(self) -> torch.dtype:
        return self.result_dtype

    @torch.no_grad()
    def read(self, dim: int = 0, start: int = 0, stop: int | None = None, new: New = allocate_in_memory) -> Tensor:
        """Rows or columns start..stop, as `Stored.read`; in a `new` tensor."""
        stop = self.shape[dim] if stop is None else stop
        shape = [*self.shape]
        shape[dim] = stop - start
        result, rows = new(shape, self.dtype), self.open_rows()
        first, last = (start, stop) if dim == 0 else (0, self.shape[0])
        for i in range(first, last, self.step):
            block = rows(i, min(i + self.step, last))
            result[i - first : i - first + len(block)] = block if dim == 0 else block[:, start:stop]
        return result


def adapt(
    checkpoint: Checkpoint, adapter: Adapter, *, merge: bool = True, dtype: torch.dtype | None = None
) -> Checkpoint:
    """The checkpoint of the base with the adapter.

    merge: with B A and what belongs to it added to the matrices; else with all of the adapter but that, so that A and B
    can be put on the layers (`lora.attach`). dtype: of the tensors that change; None: the base's.
    Raises LlamaError for what this model has no place for.
    """
    base, has_output = checkpoint.sizes, checkpoint.head is None
    args = adapter.args if has_output else replace(adapter.args, tied_embeddings=base.tied_embeddings)
    if not has_output and (OUTPUT in adapter.sizes or adapter.args.tied_embeddings != base.tied_embeddings):
        raise LlamaError(
            f"{adapter.directory} adapts the output layer, but {checkpoint.directory} has none, but a head to "
            f"{checkpoint.task} texts"
        )
    args, tensors = add_biases(args, adapter), dict(checkpoint.tensors)
    for name, shape in tensor_shapes(args).items():
        source = MATRICES[0] if name == MATRICES[1] and base.tied_embeddings else name
        if (change := find_change(adapter, name, merge)) is None and source == name and is_stored(checkpoint, name):
            continue
        for suffix in (WORDS, SCALES, SHAPE):
            tensors.pop(name + suffix, None)
        stored_dtype = checkpoint.dtype_of(source) if is_stored(checkpoint, source) else checkpoint.dtype
        rows = open_base(checkpoint, adapter, name, source, shape)
        tensors[name] = AdaptedTensor(
            name,
            (),
            whole_shape=shape,
            result_dtype=dtype or stored_dtype,
            step=max(ROWS // args.head_size, 1) * args.head_size,
            open_rows=partial(open_changed, rows, change),
        )
    return replace(checkpoint, args=args, tensors=tensors, adapter=adapter.directory)


def add_biases(args: ModelArgs, adapter: Adapter) -> ModelArgs:
    """The sizes with the biases that `lora_bias` needs a place in."""
    layers = {name.split(".")[-2] for name in adapter.tensors if name.endswith(".lora_bias")}
    flags = {BIASES.get(layer, "mlp_bias") for layer in layers}
    if "wo_bias" in flags or ("qkv_bias" in flags and not args.qkv_bias):
        flags |= {"qkv_bias", "wo_bias"}  # Llama's configuration has one key for both
    return replace(args, **dict.fromkeys(flags, True))  # type: ignore[arg-type]


def is_stored(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.tensors or checkpoint.is_quantized(name)


def open_base(
    checkpoint: Checkpoint, adapter: Adapter, name: str, source: str, shape: tuple[int, ...]
) -> Callable[[], Rows]:
    """How to read the tensor that an adapter changes: the file's that takes its place, or the base's.

    source: its name in the base, which is the embedding's for an output layer that was tied to it.
    """
    replacement = adapter.base_tensors.get(name)
    if replacement is not None:
        return lambda: read_stored(replacement)
    if not is_stored(checkpoint, source):  # a bias that the base hasn't
        return lambda: lambda start, stop: torch.zeros(stop - start, *shape[1:])
    if checkpoint.is_quantized(source):
        return lambda: read_dense(checkpoint.part(source))
    return lambda: read_stored(checkpoint.tensors[source])


def open_changed(base: Callable[[], Rows], change: Callable[[Rows], Rows] | None) -> Rows:
    return base() if change is None else change(base())


def read_stored(stored: Stored) -> Rows:
    return lambda start, stop: stored.read(0, start, stop).float()


def read_dense(whole: Tensor) -> Rows:
    return lambda start, stop: whole[start:stop].float()


def changed_tensors(adapter: Adapter, merge: bool = True) -> list[str]:
    """The names of the base's tensors that the adapter changes. merge: as in `adapt`."""
    names = [*tensor_shapes(adapter.args)]
    return [name for name in names if name in adapter.base_tensors or find_change(adapter, name, merge) is not None]


def find_change(adapter: Adapter, name: str, merge: bool) -> Callable[[Rows], Rows] | None:
    """What the adapter does to this tensor, once it was replaced; None: nothing. merge: as in `adapt`."""
    module, _, kind = name.rpartition(".")
    changes: list[Callable[[Rows], Rows]] = []
    if name in adapter.base_tensors:
        changes.append(lambda rows: rows)
    if kind == "bias" and merge and f"{module}.lora_bias" in adapter.tensors:
        r, alpha = adapter.sizes[module]
        bias = adapter.tensors[f"{module}.lora_bias"]
        changes.append(lambda rows: add_vector(rows, bias, alpha / r))
    has_low_rank = kind == "weight" and module in adapter.sizes
    # A matrix that peft has written itself is already without what the training began with.
    if has_low_rank and adapter.start is not None and is_linear(name) and name not in adapter.base_tensors:
        (r, alpha), start, size = adapter.sizes[module], adapter.start, len_of(adapter, module)
        changes.append(lambda rows: take_out_start(rows, start, size, r, alpha / r))
    if name in adapter.tokens:  # before A and B, which act on these rows too
        indices, values = adapter.tokens[name]
        changes.append(lambda rows: replace_rows(rows, indices, values))
    if has_low_rank and module == EMBEDDING:
        changes.append(lambda rows: add_to_embedding(rows, adapter))
    elif has_low_rank and merge:
        changes.append(lambda rows: add_low_rank(rows, adapter, module))
    return chain(changes) if changes else None


def chain(changes: Sequence[Callable[[Rows], Rows]]) -> Callable[[Rows], Rows]:
    def apply(rows: Rows) -> Rows:
        for change in changes:
            rows = change(rows)
        return rows

    return apply


def len_of(adapter: Adapter, module: str) -> int:
    return tensor_shapes(replace(adapter.args, tied_embeddings=False))[f"{module}.weight"][0]


# --- changes --------------------------------------------------------------------------------------------------------


def add_vector(rows: Rows, vector: Stored, scale: float) -> Rows:
    return lambda start, stop: rows(start, stop) + scale * vector.read(0, start, stop).float()


def replace_rows(rows: Rows, indices: Sequence[int], values: Stored) -> Rows:
    """The rows of some tokens are others (peft's trainable tokens)."""

    def read(start: int, stop: int) -> Tensor:
        block = rows(start, stop).clone()
        for token, value in zip(indices, values.read(), strict=True):
            if start <= token < stop:
                block[token - start] = value.float()
        return block

    return read


def add_low_rank(rows: Rows, adapter: Adapter, module: str) -> Rows:
    """W + alpha / r * B A; with a magnitude m (DoRA, arXiv:2402.09353), each row of it scaled to that length."""
    r, alpha = adapter.sizes[module]
    a, b = (adapter.tensors[f"{module}.{kind}"].read().float() for kind in ("lora_A", "lora_B"))
    magnitude = adapter.tensors.get(f"{module}.lora_magnitude")
    lengths = None if magnitude is None else magnitude.read().float()

    def read(start: int, stop: int) -> Tensor:
        block = rows(start, stop) + alpha / r * (b[start:stop] @ a)
        return block if lengths is None else block * (lengths[start:stop] / block.norm(dim=1))[:, None]

    return read


def add_to_embedding(rows: Rows, adapter: Adapter) -> Rows:
    """As `add_low_rank`, of the embedding, of which peft's A, B and magnitude are those of the transposed matrix."""
    r, alpha = adapter.sizes[EMBEDDING]
    a, b = (adapter.tensors[f"{EMBEDDING}.{kind}"].read().float() for kind in ("lora_A", "lora_B"))
    magnitude = adapter.tensors.get(f"{EMBEDDING}.lora_magnitude")

    def add(start: int, stop: int) -> Tensor:
        return rows(start, stop) + alpha / r * (a[:, start:stop].T @ b.T)

    if magnitude is None:
        return add
    words = a.shape[1]
    squares = sum(add(i, min(i + ROWS, words)).pow(2).sum(0) for i in range(0, words, ROWS))
    ratio = magnitude.read().float() / torch.as_tensor(squares).sqrt()
    return lambda start, stop: add(start, stop) * ratio


def take_out_start(rows: Rows, start: Start, size: int, r: int, scale: float) -> Rows:
    """W without what A and B were at the start of the training, which peft takes out of the base's matrix.

    PiSSA (arXiv:2404.02948): the r largest singular values. OLoRA (arXiv:2406.01775): the first r columns of Q and rows
    of R, scaled as B A is. The order of W's rows doesn't matter.
    """
    whole = rows(0, size)
    if start == "pissa":
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        part = (u[:, :r] * s[:r]) @ v[:r]
    else:
        q, upper = torch.linalg.qr(whole)
        part = scale * q[:, :r] @ upper[:r]
    return read_dense(whole - part)
