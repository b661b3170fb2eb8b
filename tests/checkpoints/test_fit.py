"""Whether a model fits the memory: numbers counted one by one, and where its limit is."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from llama.checkpoints import fit
from llama.checkpoints.schema import memory_needed, mp_sizes
from llama.errors import LlamaError
from llama.model import ModelArgs
from llama.parallel import Place

ARGS = ModelArgs(64, 3, 4, 2, 300, 32, max_batch_size=3, max_seq_len=40)
LAYER = {"wq": 64 * 64, "wk": 32 * 64, "wv": 32 * 64, "wo": 64 * 64, "w1": 192 * 64, "w2": 64 * 192, "w3": 192 * 64}
TWELVE = {"dim": 192, "n_heads": 12, "multiple_of": 48}  # hidden_dim 528
NORMS = 3 * 2 * 64 + 64
CACHE = 2 * 3 * 3 * 40 * 2 * 16


@pytest.mark.parametrize("bits", [4.5, 8.25])
def test_quantized_matrices_and_plain_ones_are_counted_apart(bits: float) -> None:
    matrices, words = 3 * sum(LAYER.values()), 300 * 64
    plain = 2 * (words + NORMS)  # bytes of the embedding and the norms, in bfloat16
    weights, cache = memory_needed(ARGS, 1, torch.bfloat16, bits)
    assert weights == pytest.approx(plain + (matrices + words) * bits / 8, abs=2)  # the output layer is quantized too
    assert cache == 2 * CACHE
    weights, _ = memory_needed(replace(ARGS, tied_embeddings=True), 1, torch.bfloat16, bits)
    assert weights == pytest.approx(2 * NORMS + (matrices + words) * bits / 8, abs=2)


@pytest.mark.parametrize(("device", "ranks", "times"), [("cpu", 1, 1), ("cpu", 2, 2), ("cuda", 2, 1)])
def test_ranks_of_a_machine_share_its_memory_and_have_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, times: int
) -> None:
    place = Place(torch.device(device), torch.float32, ranks, 0, ranks)
    needed = times * (sum(memory_needed(ARGS, ranks, torch.float32)) + 1000)
    monkeypatch.setattr(fit, "available_memory", lambda device: needed)
    fit.check_memory(ARGS, place, draft_bytes=1000)
    for draft in (1001, 5000):
        with pytest.raises(LlamaError, match="do not fit"):
            fit.check_memory(ARGS, place, draft_bytes=draft)


@pytest.mark.parametrize(("kv_heads", "ranks", "held"), [(2, 1, 2), (2, 2, 1), (2, 4, 1), (4, 2, 2), (4, 4, 1)])
def test_a_rank_caches_its_own_heads(kv_heads: int, ranks: int, held: int) -> None:
    _, cache = memory_needed(replace(ARGS, n_kv_heads=kv_heads), ranks, torch.float32)
    assert cache == 4 * 2 * 3 * 3 * 40 * held * 16


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [1, 2, 4]),
        ({"vocab_size": 301}, [1]),
        ({"vocab_size": 302}, [1, 2]),
        (TWELVE | {"n_kv_heads": 4}, [1, 2, 4, 12]),  # 6 ranks would share 4 heads unevenly
        (TWELVE | {"n_kv_heads": 6}, [1, 2, 3, 6, 12]),
        (TWELVE | {"n_kv_heads": 4, "vocab_size": 304}, [1, 2, 4]),
        ({"multiple_of": 1, "ffn_dim_multiplier": 0.525}, [1]),  # hidden_dim 89
    ],
)
def test_on_how_many_ranks_sizes_run(changes: dict[str, Any], sizes: list[int]) -> None:
    assert mp_sizes(replace(ARGS, **changes)) == sizes
