"""The functions of csrc/ on tensors of the CPU, from the library that `build` compiles once for each processor.

Knows tensors; knows no layers. `library` returns None where there is no compiler, or where the functions can't be
compiled or loaded for this processor.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from ..memory_pages import in_large_pages
from .build import load_library
from .scratch import MOST_SCRATCH, attention_scratch

LANES = 16  # floats of a vector
BLOCK = 64  # rows of a matrix whose numbers lie side by side
WORD = 4  # bytes of a row that lie together
DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}  # as the functions' names end
PLAIN_NAMES = ("pack", "gather_of_ranks")
TYPED_NAMES = (
    *("product", "product_int8", "product_int4", "quantize_int8", "quantize_int4"),
    *("rms_norm", "swiglu", "attention", "sum_of_ranks"),
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they can't be compiled or loaded."""
    return load_library([*PLAIN_NAMES, *(f"{name}_{dtype}" for name in TYPED_NAMES for dtype in DTYPES.values())])


# --- calls ------------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., int]] = {}  # the library's functions by name, once they were called
Call = tuple[Callable[[], object], tuple[object, ...]]  # what to call again, and the tensors that it uses
CAPTURED: ContextVar[list[Call] | None] = ContextVar("captured", default=None)  # by a capture in this thread


def call(name: str, *arguments: Tensor | int | float) -> int:
    """Call a function of the library and return its result. Tensors must be contiguous; they become addresses."""
    return bind(name, *arguments)()


def run(name: str, *arguments: Tensor | int | float) -> None:
    """`call` a function without a result, and record it."""
    bound = bind(name, *arguments)
    bound()
    record(bound, *arguments)


def record(bound: Callable[[], object], *tensors: object) -> None:
    """Record this call and the tensors it uses, if a capture is running in this thread."""
    if (calls := CAPTURED.get()) is not None:
        calls.append((bound, tensors))


def bind(name: str, *arguments: Tensor | int | float) -> Callable[[], int]:
    """A call of a function of the library on the memory of these tensors, with torch's present number of threads."""
    function = FUNCTIONS.get(name) or find_function(name, arguments)
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return functools.partial(function, *values, torch.get_num_threads())


def find_function(name: str, arguments: Sequence[Tensor | int | float]) -> Callable[..., int]:
    """Find a function in the library. It always takes arguments of these types, and then the number of threads."""
    function = getattr(library(), name)
    plain = {int: ctypes.c_long, float: ctypes.c_double}
    function.argtypes = [*(plain.get(type(argument), ctypes.c_void_p) for argument in arguments), ctypes.c_long]
    function.restype = ctypes.c_long
    FUNCTIONS[name] = function
    return function


# --- packing ----------------------------------------------------------------------------------------------------------


def allocate_packed(weight: Tensor) -> Tensor:
    """Room for W (N, K) to be packed into: (N / 64, K * itemsize / 4, 64, 4 / itemsize), N rounded up."""
    together = WORD // weight.itemsize
    return in_large_pages((-(-len(weight) // BLOCK), weight.shape[1] // together, BLOCK, together), weight.dtype)


def pack(weight: Tensor, packed: Tensor) -> None:
    """Fill the first blocks of `packed` with W; rows that the last block lacks are zeros there."""
    call("pack", weight.contiguous(), packed, len(weight), packed.shape[1])


def unpack(packed: Tensor, rows: int) -> Tensor:
    """The first rows of the matrix that was packed, (rows, K), in memory of their own."""
    return packed.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2).flatten(0, 1)[:rows]


def lookup(packed: Tensor, rows: Tensor) -> Tensor:
    """Rows of the matrix that was packed: (...) -> (..., K)."""
    return packed[rows // BLOCK, :, rows % BLOCK].flatten(-2)


def quantize(weight: Tensor, integers: Tensor, scales: Tensor, bits: int) -> None:
    """Fill the first blocks of `integers` and `scales`, as `QuantizedMatrix` has them, with W (N, K) quantized."""
    weight = weight.contiguous()
    call(f"quantize_int{bits}_{DTYPES[weight.dtype]}", weight, integers, scales, *weight.shape)


# --- functions of a layer, of the same names as in triton.py ----------------------------------------------------------


def product(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    """x W^T of x (..., K) and W (rows, K), packed: (..., rows), in their dtype, summed in float32."""
    columns = packed.shape[1] * packed.shape[3]
    if (x.dtype, x.shape[-1]) != (packed.dtype, columns):
        raise RuntimeError(f"x is {x.dtype} of {x.shape[-1]} columns, and the matrix {packed.dtype} of {columns}")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    run(f"product_{DTYPES[x.dtype]}", x, packed, y, x.numel() // columns, rows, columns)
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
    run(name, x, integers, scales, y, count, rows, columns, scratch)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`model.RMSNorm` over the last dimension."""
    x, dim = x.contiguous(), x.shape[-1]
    y = x.new_empty(x.shape)
    run(f"rms_norm_{DTYPES[x.dtype]}", x, weight, y, x.numel() // dim, dim, float(eps))
    return y


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, of the same shape."""
    a, b = a.contiguous(), b.contiguous()
    y = a.new_empty(a.shape)
    run(f"swiglu_{DTYPES[a.dtype]}", a, b, y, a.numel())
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
    run(f"attention_{DTYPES[xq.dtype]}", xq, xk, xv, cache_k, cache_v, angles, starts, places, out, *sizes)
    return out
