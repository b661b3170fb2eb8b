"""The CPU kernels' library is compiled once, mended if it is damaged, and done without where it can't be made."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_numbers import compiled, library_anew
from tiny import environment

from llama.accelerate.kernels import build, cpu, levels
from llama.accelerate.kernels import dispatch as kernels
from llama.errors import LlamaError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own, whose kernels are compiled fast and run slowly."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(levels, "FLAGS", ["-O0"])
    return tmp_path


def made(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


@compiled
def test_it_is_compiled_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_anew() is not None
    (library,) = made(home)
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(build, "compile_in", pytest.fail)
    assert library_anew() is not None
    assert made(home) == [library] and library.stat().st_mtime_ns == written


@compiled
@pytest.mark.parametrize("damage", ["nothing", "a beginning", "half", "all but a byte", "other"])
@pytest.mark.slow
def test_a_damaged_file_is_made_again(home: Path, damage: str) -> None:
    assert library_anew() is not None
    (library,) = made(home)
    whole = library.read_bytes()
    other = bytearray(whole)
    other[len(whole) // 2] ^= 1
    damaged = {
        "nothing": b"",
        "a beginning": whole[:100],
        "half": whole[: len(whole) // 2],
        "all but a byte": whole[:-1],
    }
    os.unlink(library)  # this process has it mapped
    library.write_bytes(damaged.get(damage, bytes(other)))
    assert not build.is_complete(library), "loading it would end this process"
    assert library_anew() is not None
    assert build.is_complete(library) and made(home) == [library]


@compiled
def test_several_may_compile_at_once(home: Path) -> None:
    found: list[object] = []
    running = [threading.Thread(target=lambda: found.append(library_anew())) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(found) == 3 and None not in found
    assert len(made(home)) == 1, "nothing else is left behind"


def failing_compiler(home: Path, patch: pytest.MonkeyPatch) -> None:
    (home / "cc").write_text("#!/bin/sh\nexit 1\n")
    (home / "cc").chmod(0o755)
    patch.setenv("PATH", str(home))


def no_home(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HOME")
    patch.setattr("pwd.getpwuid", {}.__getitem__)


def home_is_a_file(home: Path, patch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    patch.setenv("HOME", str(home / "file"))


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda home, patch: patch.setenv("PATH", str(home)), id="no compiler"),
        failing_compiler,
        no_home,
        home_is_a_file,
        pytest.param(lambda home, patch: patch.setenv("HOME", "/proc/self"), id="a home that can't be written"),
        pytest.param(lambda home, patch: patch.setattr(build, "SECONDS_TO_COMPILE", 0.001), id="no time"),
        pytest.param(lambda home, patch: patch.setattr(levels, "FLAGS", ["-march=none"]), id="no such processor"),
    ],
)
def test_where_it_cannot_be_compiled_there_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    trouble(home, monkeypatch)
    assert library_anew() is None
    monkeypatch.setattr(cpu, "library", library_anew)
    assert not kernels.is_available(torch.zeros(1)) and not kernels.can_pack(torch.zeros(2, 2))


def test_levels_of_processors() -> None:
    """The fastest that a processor has comes first; one without AVX2 has none."""
    haswell = set(levels.AVX2.needs)
    skylake = haswell | levels.AVX512.needs
    for features, expected in (
        (set[str](), []),
        (haswell - {"fma"}, []),
        (haswell, ["avx2"]),
        (haswell | {"avx_vnni"}, ["avx2-vnni", "avx2"]),
        (skylake, ["avx512", "avx2"]),
        (skylake | {"avx512_vnni", "avx512_bf16"}, ["avx512-bf16", "avx512-vnni", "avx512", "avx2"]),
        (skylake | levels.AMX.needs, ["amx", "avx512-bf16", "avx512-vnni", "avx512", "avx2"]),
    ):
        assert [level.name for level in levels.find_levels(sorted(features))] == expected


def test_a_level_is_chosen_by_its_name() -> None:
    try:
        for level in cpu.find_own_levels():
            cpu.choose_level(level.name)
            assert cpu.library() is cpu.load_level(level)
        cpu.choose_level("none")
        assert cpu.library() is None and not kernels.is_available(torch.zeros(1))
        with pytest.raises(LlamaError, match=r"kernels 'avx1024' are not for this processor: expected one of .*none"):
            cpu.choose_level("avx1024")
    finally:
        cpu.choose_level(None)


@compiled
def test_a_compiler_that_is_too_old_for_a_level_makes_the_next_one(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = own = cpu.find_own_levels()
    newer = levels.Level("newer", first.needs, (*first.flags, "-mnot-known-yet"))
    for _ in range(2):
        assert build.load_library(["pack"], [newer, *own]) is not None
    assert sorted(path.name.rpartition("-")[0] for path in made(home)) == sorted([first.name, "newer"])
    assert capsys.readouterr().err == ""


@compiled
def test_kernels_of_a_lower_level_answer_in_bfloat16(tmp_path: Path) -> None:
    """Where torch itself would compute in float32."""
    held = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    program = """
import torch
from llama import Llama
from llama.accelerate.kernels.cpu import choose_level
from llama.checkpoints.demo import demo_checkpoint
for level in ("avx2", "none"):
    choose_level(level)
    assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    llama = Llama.build(demo_checkpoint(), max_seq_len=64, max_batch_size=1, device="cpu")
    print(llama.model.dtype, llama.text_completion(["The capital of Spain is"], 0, max_gen_len=3)[0]["generation"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment(), **held}, capture_output=True, text=True
    )
    expected = ["torch.bfloat16  Madrid. The", "torch.float32  Madrid. The"]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]
