"""What tests/checkpoints/test_compressed_tensors.py compares, also on ranks: matrices that loading rounds, and stored
ones.
"""

import torch

from llama import Llama
from llama.accelerate.layers import PackedLinear
from llama.accelerate.quantization import IntegerPanels, Rounded

OPTIONS = {"device": "cpu", "dtype": "float32", "max_seq_len": 64}


def all_panels(llama: Llama) -> dict[str, Rounded]:
    layers = {n: m.panels for n, m in llama.model.named_modules() if isinstance(m, PackedLinear)}
    return {name: panels.by_rows() for name, panels in layers.items() if isinstance(panels, IntegerPanels)}


def same_panels(a: Llama, b: Llama) -> bool:
    found, expected = all_panels(a), all_panels(b)
    return found.keys() == expected.keys() and all(
        torch.equal(found[n].words, expected[n].words) and torch.equal(found[n].scales, expected[n].scales)
        for n in expected
    )


def check_same(plain: str, stored: str, quantization: str) -> None:
    rounded = Llama.build(plain, **OPTIONS, quantization=quantization)
    loaded = Llama.build(stored, **OPTIONS)
    assert all_panels(rounded) and same_panels(loaded, rounded)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens), rounded.model(tokens))
