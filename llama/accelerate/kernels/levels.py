"""Levels of processors that csrc/ is compiled for, what each needs, and how a compiler is called for it.

Knows names of flags alone: setup.py runs this file on its own, where nothing is installed yet.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = ("calls.c", "products.c", "integers.c", "attention.c", "ranks.c")  # in csrc/, with HEADERS
HEADERS = ("vectors.h", "avx2.h", "avx512.h")
FLAGS = [
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]


@dataclass(frozen=True)
class Level:
    """Instructions that some processors have."""

    name: str
    needs: frozenset[str]  # as /proc/cpuinfo names them
    flags: tuple[str, ...]  # of gcc and clang


def make_level(name: str, base: "Level | None", *features: str) -> Level:
    """A level above `base`. features: as compilers name them; Linux writes most of them alike."""
    words = {feature: LINUX_NAMES.get(feature, feature) for feature in features}
    needs, flags = frozenset(words.values()), tuple(f"-m{feature}" for feature in words)
    return Level(name, needs, flags) if base is None else Level(name, base.needs | needs, base.flags + flags)


LINUX_NAMES = {
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
}
AVX2 = make_level("avx2", None, "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "popcnt")
AVX2_VNNI = make_level("avx2-vnni", AVX2, "avxvnni")
AVX512 = make_level("avx512", AVX2, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl")
AVX512_VNNI = make_level("avx512-vnni", AVX512, "avx512vnni")
AVX512_BF16 = make_level("avx512-bf16", AVX512_VNNI, "avx512bf16")
AMX = make_level("amx", AVX512_BF16, "amx-tile", "amx-bf16")
LEVELS = (AMX, AVX512_BF16, AVX512_VNNI, AVX512, AVX2_VNNI, AVX2)  # the fastest first


def find_levels(features: Sequence[str]) -> list[Level]:
    """The levels that a processor with these features has, the fastest first."""
    return [level for level in LEVELS if level.needs.issubset(features)]


def find_compiler() -> str | None:
    """The path of a C compiler, if there is one."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compile_commands(compiler: str, level: Level, directory: Path) -> list[list[str]]:
    """The calls that compile SOURCES to objects where they are made; they may run side by side.

    directory: csrc/.
    """
    flags = [compiler, *FLAGS, *level.flags, "-fopenmp", "-fPIC", "-c"]
    return [[*flags, str(directory / source)] for source in SOURCES]


def link_command(compiler: str, library: Path) -> list[str]:
    """The call that then makes the library of the objects.

    It is not linked with OpenMP: it uses torch's, so that both share one set of threads.
    """
    return [compiler, "-shared", *(Path(source).with_suffix(".o").name for source in SOURCES), "-o", str(library)]


def seal(library: bytes) -> bytes:
    """What a library's file holds: the hash comes last, so that a part of it is known as such."""
    return library + hashlib.sha256(library).digest()
