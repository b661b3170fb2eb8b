"""On every device that this machine has, the same text: run these where there is a GPU, too."""

from pathlib import Path

import pytest
import torch
from tiny import PROMPTS, greedy_by_hand, write_checkpoint

from llama import Llama
from llama._util.device import choose_dtype

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("device"))


@pytest.mark.parametrize("device", DEVICES)
def test_text_is_the_same(directory: Path, device: str) -> None:
    llama = Llama.build(directory, device=device, dtype="float32")
    prompts = [llama.tokenizer.encode(p, bos=True, eos=False) for p in PROMPTS]
    greedy, _ = llama.generate(prompts, 25, temperature=0)
    here, cpu = (Llama.build(directory, device=d, dtype="float32") for d in (device, "cpu"))
    assert greedy == [greedy_by_hand(cpu, p, 25) for p in prompts]
    sampled = here.text_completion(PROMPTS, temperature=1.0, max_gen_len=25)
    assert sampled == cpu.text_completion(PROMPTS, temperature=1.0, max_gen_len=25)


@pytest.mark.parametrize("device", DEVICES)
def test_everything_lives_where_it_was_put_in_the_dtype_asked_for(directory: Path, device: str) -> None:
    llama = Llama.build(directory, device=device)
    expected = choose_dtype(None, torch.device(device))
    llama.text_completion(PROMPTS, max_gen_len=3)
    attentions = [layer.attention for layer in llama.model.layers]
    slots = [cache for a in attentions for cache in llama.model.kv_cache.caches(a, torch.empty(0))]
    llama.model(torch.ones(1, 2, dtype=torch.long, device=device), 0)
    for tensor in (*llama.model.parameters(), *llama.model.buffers(), *slots):
        assert (tensor.device.type, tensor.dtype) == (device, expected)
    assert len(list(llama.model.buffers())) == 2 * llama.model.n_layers
