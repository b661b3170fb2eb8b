"""The functions of csrc/ on tensors of the CPU, from the library that `build` has for the processor's level.

Knows tensors; knows no layers. `library` returns None where there is no compiler, or where the functions can't be
compiled or loaded for this processor.
"""

import ctypes
import functools
import struct
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...errors import LlamaError, shorten
from ..memory_pages import in_large_pages
from .build import cpuinfo, load_library
from .levels import Level, find_levels
from .scratch import MOST_SCRATCH, attention_scratch

LANES = 16  # floats of the longest vector: heads are whole ones of any level's
BLOCK = 64  # rows of a matrix whose numbers lie side by side
WORD = 4  # bytes of a row that lie together
DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}  # as the functions' names end
ARGUMENTS = 17  # of a call at most, as in csrc/calls.c
PLAIN_NAMES = ("run_calls", "pack", "gather_of_ranks")
TYPED_NAMES = (
    *("product", "product_int8", "product_int4", "quantize_int8", "quantize_int4"),
    *("embed", "rms_norm", "swiglu", "add", "attention", "sum_of_ranks"),
)


CHOSEN: list[str] = []  # the name of a level, or NO_KERNELS, once `choose_level` was called
NO_KERNELS = "none"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they can't be compiled or loaded."""
    levels = find_own_levels()
    return load_level(*(level for level in levels if not CHOSEN or level.name in CHOSEN))


@functools.cache
def load_level(*levels: Level) -> ctypes.CDLL | None:
    """The functions, compiled for the first of these levels for which they can be had."""
    typed = [f"{name}_{dtype}" for name in TYPED_NAMES for dtype in DTYPES.values()]
    return load_library([*PLAIN_NAMES, *typed], levels) if levels else None


@functools.cache
def find_own_levels() -> list[Level]:
    """The levels of this processor, the fastest first."""
    return find_levels((cpuinfo("flags") or "").split())


def choose_level(name: str | None) -> None:
    """Use the kernels of this level from now on, in the whole process. Raises LlamaError where the processor lacks it.

    name: such as "avx2"; "none": torch's own operations alone; None: the fastest level that there is.
    """
    known = [*(level.name for level in find_own_levels()), NO_KERNELS]
    if name is not None and name not in known:
        raise LlamaError(f"kernels {shorten(name)} are not for this processor: expected one of {', '.join(known)}")
    CHOSEN[:] = [] if name is None else [name]
    library.cache_clear()


# --- calls ------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of a function of the library on the memory of tensors."""

    name: str  # the function's
    arguments: tuple[Tensor | int | float, ...]
    writes: tuple[Tensor, ...]
    wait_on: Callable[[float], None] | None = None  # called with seconds while other ranks don't come; may raise


CAPTURED: ContextVar[list[Any] | None] = ContextVar("captured", default=None)  # by a capture in this thread
LAYOUTS: dict[str, struct.Struct] = {}  # of calls in csrc/calls.c, by the functions' names, once they were called


class CallList:
    """Calls that are made one after another, by one team of threads, as many as torch has when the list is made."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = calls  # which keep their tensors
        self._threads = torch.get_num_threads()
        packed = [pack_call(call, waits) for call, waits in zip(calls, find_waits(calls), strict=True)]
        self._size, self._memory = len(packed[0]), ctypes.create_string_buffer(b"".join(packed))
        self._address, self._run_calls = ctypes.addressof(self._memory), find_runner(library())

    def __call__(self) -> None:
        done, count, waiting, started = 0, len(self.calls), -1, 0.0
        while (done := done + self._run_calls(self._address + done * self._size, count - done, self._threads)) < count:
            if done != waiting:
                waiting, started = done, time.monotonic()
            cast(Callable[[float], None], self.calls[done].wait_on)(time.monotonic() - started)


def find_waits(calls: Sequence[Call]) -> list[bool]:
    """Before which calls threads have to wait for each other: before those that use what others wrote since.

    What one reads or writes is the storage of a tensor, as a whole.
    """
    if len(calls) == 1:  # each kernel outside of a capture: nothing is looked at
        return [False]
    waits, used, written = [], set[int](), set[int]()
    for call in calls:
        uses = {x.untyped_storage().data_ptr() for x in call.arguments if isinstance(x, Tensor)}
        writes = {x.untyped_storage().data_ptr() for x in call.writes}
        waits.append(bool(uses & written or writes & used))
        if waits[-1]:
            used, written = set(), set()
        used, written = used | uses, written | writes
    return waits


def run(
    name: str,
    *arguments: Tensor | int | float,
    writes: tuple[Tensor, ...],
    wait_on: Callable[[float], None] | None = None,
) -> None:
    """Call a function of the library, and record the call if a capture is running in this thread.

    Tensors must be contiguous; they become addresses. writes: those of them that it writes. wait_on: as in `Call`.
    """
    call = Call(name, arguments, writes, wait_on)
    CallList([call])()
    if (calls := CAPTURED.get()) is not None:
        calls.append(call)


def pack_call(call: Call, waits: bool) -> bytes:
    """A call as csrc/calls.c has it. A function always takes arguments of the same types."""
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in call.arguments]
    if (layout := LAYOUTS.get(call.name)) is None:
        types = "".join("d" if isinstance(x, float) else "q" for x in values)
        layout = LAYOUTS[call.name] = struct.Struct(f"Pq{types}{8 * (ARGUMENTS - len(values))}x")
    return layout.pack(find_address(library(), call.name), waits, *values)


@functools.cache
def find_runner(library: ctypes.CDLL) -> Callable[[int, int, int], int]:
    """`run_calls` of the library."""
    function = library.run_calls
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long), ctypes.c_long
    return function


@functools.cache
def find_address(library: ctypes.CDLL, name: str) -> int:
    """The address of a function of the library."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


# --- packing ----------------------------------------------------------------------------------------------------------


def allocate_packed(weight: Tensor) -> Tensor:
    """Room for W (N, K) to be packed into: (N / 64, K * itemsize / 4, 64, 4 / itemsize), N rounded up."""
    together = WORD // weight.itemsize
    return in_large_pages((-(-len(weight) // BLOCK), weight.shape[1] // together, BLOCK, together), weight.dtype)


def pack(weight: Tensor, packed: Tensor) -> None:
    """Fill the first blocks of `packed` with W; rows that the last block lacks are zeros there."""
    run("pack", weight.contiguous(), packed, len(weight), packed.shape[1], writes=(packed,))


def unpack(packed: Tensor, rows: int) -> Tensor:
    """The first rows of the matrix that was packed, (rows, K), in memory of their own."""
    return packed.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2).flatten(0, 1)[:rows]


def lookup(packed: Tensor, rows: Tensor) -> Tensor:
    """Rows of the matrix that was packed: (...) -> (..., K)."""
    return packed[rows // BLOCK, :, rows % BLOCK].flatten(-2)


def quantize(weight: Tensor, integers: Tensor, scales: Tensor, bits: int) -> None:
    """Fill the first blocks of `integers` and `scales`, as `QuantizedMatrix` has them, with W (N, K) quantized."""
    weight = weight.contiguous()
    name = f"quantize_int{bits}_{DTYPES[weight.dtype]}"
    run(name, weight, integers, scales, *weight.shape, writes=(integers, scales))


# --- functions of a layer, of the same names as in triton.py ----------------------------------------------------------


def product(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    """x W^T of x (..., K) and W (rows, K), packed: (..., rows), in their dtype, summed in float32."""
    columns = packed.shape[1] * packed.shape[3]
    if (x.dtype, x.shape[-1]) != (packed.dtype, columns):
        raise RuntimeError(f"x is {x.dtype} of {x.shape[-1]} columns, and the matrix {packed.dtype} of {columns}")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    run(f"product_{DTYPES[x.dtype]}", x, packed, y, x.numel() // columns, rows, columns, writes=(y,))
    return y


def integer_product(x: Tensor, integers: Tensor, scales: Tensor, rows: int, bits: int) -> Tensor:
    """x W^T of x (..., K) and W as `QuantizedMatrix` has it: (..., rows), in the dtype of x.

    Each group of x is quantized to 8 bits too, so that integers are multiplied.
    """
    columns, group = x.shape[-1], integers.shape[2] * WORD * 8 // bits
    if -(-columns // group) != integers.shape[1]:
        raise RuntimeError(f"x has {columns} columns, and the matrix {integers.shape[1]} groups of {group}")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    count = x.numel() // columns
    scratch = torch.empty(count * integers.shape[1] * (8 + group), dtype=torch.uint8)
    name = f"product_int{bits}_{DTYPES[x.dtype]}"
    run(name, x, integers, scales, y, count, rows, columns, scratch, writes=(y, scratch))
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`model.RMSNorm` over the last dimension."""
    x, dim = x.contiguous(), x.shape[-1]
    y = x.new_empty(x.shape)
    run(f"rms_norm_{DTYPES[x.dtype]}", x, weight, y, x.numel() // dim, dim, float(eps), writes=(y,))
    return y


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, of the same shape."""
    a, b = a.contiguous(), b.contiguous()
    y = a.new_empty(a.shape)
    run(f"swiglu_{DTYPES[a.dtype]}", a, b, y, a.numel(), writes=(y,))
    return y


def add(x: Tensor, z: Tensor) -> Tensor:
    """x (..., N) + z, which has the same shape, or is (N)."""
    if z.shape not in (x.shape, x.shape[-1:]) or z.dtype != x.dtype:
        raise RuntimeError(f"x is {x.dtype} {tuple(x.shape)}, and what is added {z.dtype} {tuple(z.shape)}")
    x, z = x.contiguous(), z.contiguous()
    y = x.new_empty(x.shape)
    is_row, columns = z.ndim < x.ndim, x.shape[-1]
    run(f"add_{DTYPES[x.dtype]}", x, z, y, x.numel() // columns, columns, int(is_row), writes=(y,))
    return y


def embed(tokens: Tensor, weight: Tensor, rows: int, columns: int, first: int) -> Tensor:
    """Rows of W (rows, columns), packed or plain, for tokens (...), of which `first` is W's first: (..., columns).

    Zeros for tokens that W doesn't have.
    """
    tokens = tokens.contiguous().long()
    y = weight.new_empty(*tokens.shape, columns)
    sizes = (tokens.numel(), rows, columns, first, int(weight.ndim > 2))
    run(f"embed_{DTYPES[weight.dtype]}", tokens, weight, y, *sizes, writes=(y,))
    return y


def attends(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> bool:
    """Whether `attention` takes heads of this size: whole vectors, and not so large that a thread's stack overflows."""
    return head_dim % LANES == 0 and attention_scratch(heads, kv_heads, head_dim, itemsize) <= MOST_SCRATCH


def attention(
    xq: Tensor,
    xk: Tensor,
    xv: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    angles: Tensor,
    starts: Tensor,
    window: int,
    slots: Tensor | None = None,
) -> Tensor:
    """Attention of each row's T new tokens, their keys and values written to the caches: (B, T, H, D).

    xq: (B, T, H, D), xk: (B, T, KV, D), not rotated; xv: (B, T, KV, D). caches: (slots, S, KV, D), which lie in memory
    as (slots, KV, S, D). angles: complex numbers as (1 or B, T, D). starts: integers (B), the positions of the first
    tokens. window: each token sees so many positions up to its own. slots: integers (B), where the rows lie in the
    caches; None: row b at b. A row of one token whose position is below 0 is
    left out: nothing is written, and its output means nothing.
    """
    bsz, seqlen, heads, head_dim = xq.shape
    max_seq_len, kv_heads = cache_k.shape[1:3]
    if not attends(heads, kv_heads, head_dim, xq.itemsize):
        raise RuntimeError(f"there is no kernel for {heads} heads of {head_dim}, {kv_heads} of them with keys")
    out = xq.new_empty(xq.shape)
    angle_stride = angles[0].numel() if len(angles) > 1 else 0
    xq, xk, xv, angles, starts = (x.contiguous() for x in (xq, xk, xv, angles, starts.long()))
    places = 0 if slots is None else slots.contiguous().long()  # 0: a null pointer
    sizes = (bsz, seqlen, heads, kv_heads, head_dim, max_seq_len, window, angle_stride)
    name, written = f"attention_{DTYPES[xq.dtype]}", (cache_k, cache_v, out)
    run(name, xq, xk, xv, cache_k, cache_v, angles, starts, places, out, *sizes, writes=written)
    return out
