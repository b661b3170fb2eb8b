"""The functions of native/ on tensors. Compiled once for each processor, in a few seconds, and kept in a cache.

Knows tensors; knows no layers. Where there is no compiler, or nothing for this processor that it made and that can be
loaded, `available` says so. Tensors on a GPU go to functions of the same names in gpu_kernels.py, where Triton works.
"""

import ctypes
import functools
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..._util.files import cache_home
from ..memory_pages import in_large_pages

SOURCES = ("products.c", "integers.c", "attention.c", "ranks.c")  # in native/, with HEADER
HEADER = "vectors.h"
LANES = 16  # floats of a vector
PANEL = 64  # rows of a matrix whose numbers stand side by side
WORD = 4  # bytes of a row that stand together
FLAGS = [
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
DTYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
MOST_ROWS_ON_GPU = 16  # of x, that are multiplied by integers there: as many as a tensor core does at a time
GPU_DTYPES = (*DTYPES, torch.float16)
SECONDS_TO_COMPILE = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled SOURCES, or None where they can't be."""
    sources = [Path(__file__).with_name("csrc") / name for name in SOURCES]
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        content = b"".join(path.read_bytes() for path in (*sources, sources[0].with_name(HEADER)))
        key = hashlib.sha256(content + repr((FLAGS, compiler, processor())).encode()).hexdigest()
        path = cache_home() / "kernels" / f"{key[:32]}.so"
        if not is_complete(path):
            compile_to(path, sources, compiler)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        return None


def processor() -> str:
    """What tells processors apart for which code was compiled."""
    return cpuinfo("flags", "Features") or f"{platform.machine()} {platform.processor()}"


def cpuinfo(*keys: str) -> str | None:
    """What Linux says of the first core under the first of these keys that it has; None on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), None)


def is_complete(path: Path) -> bool:
    """Whether it ends with the hash of all before, as `compile_to` leaves it: to load a part would end the process."""
    content = path.read_bytes() if path.is_file() else b""
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def compile_to(path: Path, sources: list[Path], compiler: str) -> None:
    """Make the library under another name and rename it: ranks may do this at the same time.

    It isn't linked with OpenMP: what it calls is found in torch's own, so that both share one set of threads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        run = functools.partial(
            subprocess.run, check=True, capture_output=True, timeout=SECONDS_TO_COMPILE, cwd=directory
        )
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda source: run([compiler, *FLAGS, "-fopenmp", "-fPIC", "-c", source]), sources))
        linked = Path(directory, "kernels.so")
        run([compiler, "-shared", *(source.with_suffix(".o").name for source in sources), "-o", linked])
        with linked.open("r+b") as f:
            f.write(hashlib.sha256(f.read()).digest())
        os.replace(linked, path)


@functools.cache
def on_gpu() -> ModuleType | None:
    """gpu_kernels.py, where one of its kernels runs; None without the GPU, the Triton or the compiler that it needs."""
    if not torch.cuda.is_available():
        return None
    try:
        module = importlib.import_module(".triton", __package__)
        module.swiglu(*torch.ones(2, 16, device="cuda"))
    except Exception:  # Triton has many of its own, and torch one for each of CUDA's
        return None
    return module


def takes(x: Tensor) -> bool:
    """Whether `x` is what kernels compute with, where there are any."""
    if x.device.type == "cuda":  # whether there are was found out before anything is compiled
        return x.dtype in GPU_DTYPES and (bool(GPU) if torch.compiler.is_compiling() else on_gpu() is not None)
    return x.device.type == "cpu" and x.dtype in DTYPES


def attends(x: Tensor, seqlen: int) -> bool:
    """Whether `attention` is for so many tokens a row: on a GPU it is for one."""
    return takes(x) and (seqlen == 1 or x.device.type == "cpu")


def available(like: Tensor) -> bool:
    """Whether there are kernels for tensors such as this one."""
    with torch.cuda.device_of(like):  # which is the one to try
        return takes(like) and (like.device.type == "cuda" or library() is not None)


def call(name: str, *arguments: Tensor | int | float) -> int:
    """Run a function of the library, and give what it returns, if it does. Tensors become their addresses: they must be
    contiguous."""
    return prepared(name, *arguments)()


def run(name: str, *arguments: Tensor | int | float) -> None:
    """`call` one that returns nothing, and have it noted."""
    doing = prepared(name, *arguments)
    doing()
    note(doing, *arguments)


def note(doing: Callable[[], object], *on: object) -> None:
    """Tell who takes notes in this thread what was done, and on what, which is to be kept for as long as it may be done
    again."""
    if (notes := NOTES.get()) is not None:
        notes.append((doing, on))


def prepared(name: str, *arguments: Tensor | int | float) -> Callable[[], int]:
    """A call of a function of the library, on memory that is what it is by now."""
    found = FUNCTIONS.get(name) or function(name, arguments)
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return functools.partial(found, *values, torch.get_num_threads())


FUNCTIONS: dict[str, Callable[..., int]] = {}  # that were called before
Note = tuple[Callable[[], object], tuple[object, ...]]
NOTES: ContextVar[list[Note] | None] = ContextVar("notes", default=None)


def function(name: str, arguments: Sequence[Tensor | int | float]) -> Callable[..., int]:
    """A function of the library, which always takes arguments of these kinds, and the number of threads."""
    found = getattr(library(), name)
    plain = {int: ctypes.c_long, float: ctypes.c_double}
    found.argtypes = [*(plain.get(type(argument), ctypes.c_void_p) for argument in arguments), ctypes.c_long]
    found.restype = ctypes.c_long
    FUNCTIONS[name] = found
    return found


def fit(weight: Tensor) -> bool:
    """Whether this matrix is to be packed: on a CPU that has kernels, where its rows are whole words."""
    return (
        weight.device.type == "cpu"
        and available(weight)
        and weight.ndim == 2
        and weight.shape[1] * weight.itemsize % WORD == 0
    )


def new_panels(weight: Tensor) -> Tensor:
    """Room for W (N, K), packed: (N / 64, K * itemsize / 4, 64, 4 / itemsize), N rounded up."""
    together = WORD // weight.itemsize
    return in_large_pages((-(-len(weight) // PANEL), weight.shape[1] // together, PANEL, together), weight.dtype)


def pack(weight: Tensor, panels: Tensor) -> None:
    """Fill the first of `panels` with W; the rows that it lacks for the last one are zeros there."""
    call("pack", weight.contiguous(), panels, len(weight), panels.shape[1])


def unpack(panels: Tensor, rows: int) -> Tensor:
    """The first rows of the matrix that was packed, (rows, K)."""
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:rows]


def lookup(panels: Tensor, rows: Tensor) -> Tensor:
    """Rows of the matrix that was packed: (...) -> (..., K)."""
    return panels[rows // PANEL, :, rows % PANEL].flatten(-2)


OPERATORS: dict[str, Callable[..., Tensor]] = {}  # once `register` was called
LIBRARIES: list[torch.library.Library] = []
GPU: list[ModuleType] = []  # with its functions, where there is one
OUTPUTS: dict[str, Callable[..., Tensor]] = {  # of what shape the result is, for who traces a function
    "product": lambda x, panels, rows: x.new_empty(*x.shape[:-1], rows),
    "integer_product": lambda x, integers, scales, rows, bits: x.new_empty(*x.shape[:-1], rows),
    "rms_norm": lambda x, *_: x.new_empty(x.shape),
    "swiglu": lambda x, *_: x.new_empty(x.shape),
    "attention": lambda x, *_: x.new_empty(x.shape),
}


def traced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, or the GPU's, which torch.compile takes as one operation that it doesn't look into."""

    @functools.wraps(function)
    def either(x: Tensor, *arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return OPERATORS[function.__name__](x, *arguments)
        if x.device.type == "cuda":
            return getattr(on_gpu(), function.__name__)(x, *arguments)
        return function(x, *arguments)

    return either


@functools.cache
def register() -> None:
    """Make the functions known to torch's dispatcher, in `torch.ops.llama`. To be called before they are traced."""
    library, module = torch.library.Library("llama", "FRAGMENT"), on_gpu()
    GPU.extend([] if module is None else [module])
    for name, output in OUTPUTS.items():
        function = globals()[name].__wrapped__
        # That attention writes to its caches isn't told: a step has nothing else that touches them.
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        library.impl(name, function, "CPU")
        if hasattr(module, name):
            library.impl(name, getattr(module, name), "CUDA")
        torch.library.register_fake(f"llama::{name}", output, lib=library)
        OPERATORS[name] = getattr(torch.ops.llama, name).default
    LIBRARIES.append(library)  # which they live as long as


@traced
def product(x: Tensor, panels: Tensor, rows: int) -> Tensor:
    """x W^T of x (..., K) and W (rows, K), packed: (..., rows), in their dtype, summed in float32."""
    columns = panels.shape[1] * panels.shape[3]
    if (x.dtype, x.shape[-1]) != (panels.dtype, columns):
        raise RuntimeError(f"x is {x.dtype} of {x.shape[-1]} columns, and the matrix {panels.dtype} of {columns}")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    run(f"product_{DTYPES[x.dtype]}", x, panels, y, x.numel() // columns, rows, columns)
    return y


def round_to_integers(weight: Tensor, integers: Tensor, scales: Tensor, bits: int) -> None:
    """Fill the first panels of `integers` and `scales`, as `panels.IntegerPanels` has them, with W (N, K) rounded."""
    weight = weight.contiguous()
    call(f"round_int{bits}_{DTYPES[weight.dtype]}", weight, integers, scales, *weight.shape)


@traced
def integer_product(x: Tensor, integers: Tensor, scales: Tensor, rows: int, bits: int) -> Tensor:
    """x W^T of x (..., K) and W as `panels.IntegerPanels` has it: (..., rows), in the dtype of x.

    Each group of x is rounded to 8 bits too, so that integers are multiplied.
    """
    columns, group = x.shape[-1], integers.shape[2] * WORD * 8 // bits
    if -(-columns // group) != integers.shape[1]:
        raise RuntimeError(f"x has {columns} columns, and the matrix {integers.shape[1]} groups of {group}")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    count = x.numel() // columns
    room = torch.empty(count * integers.shape[1] * (8 + group), dtype=torch.uint8)
    name = f"product_int{bits}_{DTYPES[x.dtype]}"
    run(name, x, integers, scales, y, count, rows, columns, room)
    return y


@traced
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`model.RMSNorm` over the last dimension."""
    x, dim = x.contiguous(), x.shape[-1]
    y = x.new_empty(x.shape)
    run(f"rms_norm_{DTYPES[x.dtype]}", x, weight, y, x.numel() // dim, dim, float(eps))
    return y


@traced
def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, of the same shape."""
    a, b = a.contiguous(), b.contiguous()
    y = a.new_empty(a.shape)
    run(f"swiglu_{DTYPES[a.dtype]}", a, b, y, a.numel())
    return y


@traced
def attention(
    xq: Tensor, xk: Tensor, xv: Tensor, cache_k: Tensor, cache_v: Tensor, angles: Tensor, starts: Tensor, window: int
) -> Tensor:
    """Attention of each row's T new tokens, their keys and values written to the caches: (B, T, H, D).

    xq: (B, T, H, D), xk: (B, T, KV, D), not rotated; xv: (B, T, KV, D); caches: (rows, S, KV, D), which lie in memory
    as (rows, KV, S, D); angles: complex numbers as (1 or B, T, D);
    starts: integers (B), positions of the first tokens. Each looks at the last `window` positions up to its own. A
    single token below 0 is none: nothing is written, and what comes out means nothing.
    """
    bsz, seqlen, heads, head_dim = xq.shape
    room, kv_heads = cache_k.shape[1:3]
    out = xq.new_empty(xq.shape)
    turn = angles[0].numel() if len(angles) > 1 else 0
    xq, xk, xv, angles, starts = (x.contiguous() for x in (xq, xk, xv, angles, starts.long()))
    sizes = (bsz, seqlen, heads, kv_heads, head_dim, room, window, turn)
    run(f"attention_{DTYPES[xq.dtype]}", xq, xk, xv, cache_k, cache_v, angles, starts, out, *sizes)
    return out
