"""Sizes that no kernel can take are refused before native code runs, and those it takes stay within their memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARGS, ROOT, environment, write_checkpoint

from llama import Llama
from llama.accelerate.kernels import build, cpu, levels
from llama.accelerate.kernels.scratch import attention_scratch

SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-Wno-psabi"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 8, 128), (32, 32, 64), (28, 4, 128), (8, 1, 256), (64, 8, 128), (71, 1, 64), (16, 8, 128), (1, 1, 16)],
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_published_sizes_have_a_kernel(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> None:
    assert cpu.attends(heads, kv_heads, head_dim, itemsize)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(2, 2, 4096), (1, 1, 2048), (1, 1, 1 << 30), (4096, 1, 128), (100_000, 1, 16), (8, 8, 20), (1, 1, 2)],
)
def test_others_have_none(heads: int, kv_heads: int, head_dim: int) -> None:
    assert not cpu.attends(heads, kv_heads, head_dim, 4)
    if head_dim <= 4096:
        q, k = torch.zeros(1, 2, heads, head_dim), torch.zeros(1, 2, kv_heads, head_dim)
        with pytest.raises(RuntimeError, match="there is no kernel for"):
            cpu.attention(q, k, k, k.clone(), k.clone(), torch.zeros(1, 2, head_dim), torch.tensor([0]), 9)


@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 600), st.sampled_from([2, 4]))
def test_more_heads_or_larger_ones_take_no_less(group: int, vectors: int, more: int, itemsize: int) -> None:
    here = attention_scratch(group, 1, 16 * vectors, itemsize)
    assert attention_scratch(group, 1, 16 * (vectors + more), itemsize) > here > 0
    assert attention_scratch(8 * group, 8, 16 * vectors, itemsize) == here


@pytest.mark.parametrize("head_dim", [2, 6, 48, 4096])
def test_a_model_of_odd_heads_generates(head_dim: int, tmp_path: Path) -> None:
    args = dict(vars(ARGS), n_heads=2, n_kv_heads=1, head_dim=head_dim, n_layers=1)
    llama = Llama.build(write_checkpoint(tmp_path, type(ARGS)(**args)), device="cpu", dtype="float32", max_seq_len=32)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = llama.model(tokens)
        cached = torch.cat([llama.model(tokens[:, :3], 0), llama.model(tokens[:, 3:], 3)], dim=1)
    assert (whole - cached).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("level", cpu.find_own_levels(), ids=lambda level: level.name)
def test_nothing_is_read_or_written_out_of_place(level: levels.Level, tmp_path: Path) -> None:
    """By the sanitizers of gcc, at each level that this processor has."""
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs gcc's sanitizers")
    name = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(name).is_absolute():
        pytest.skip("needs gcc's sanitizers")
    library = tmp_path / "kernels.so"
    commands = levels.compile_commands(compiler, level, build.CSRC)
    running = [subprocess.Popen([*command, *SANITIZERS], cwd=tmp_path) for command in commands]
    assert [process.wait(900) for process in running] == [0] * len(running)
    subprocess.run([*levels.link_command(compiler, library), *SANITIZERS], cwd=tmp_path, check=True)
    preload = {"LD_PRELOAD": name, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "accelerate" / "sanitized_kernels.py", library],
        env={**os.environ, **environment(), **preload},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and done.stdout.endswith(" calls\n"), done.stderr[-3000:]
