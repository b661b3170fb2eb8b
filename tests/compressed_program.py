"""What tests/checkpoints/test_compressed_tensors.py compares, also on ranks: matrices that loading quantizes, and
stored ones.
"""

import torch

from llama import Llama
from llama.accelerate.layers import packed_weight
from llama.accelerate.quantization import QuantizedMatrix, QuantizedRows

OPTIONS = {"device": "cpu", "dtype": "float32", "max_seq_len": 64}


def all_quantized(llama: Llama) -> dict[str, QuantizedRows]:
    weights = {name: packed_weight(layer) for name, layer in llama.model.named_modules() if name != "tok_embeddings"}
    matrices = {name: weight.packed for name, weight in weights.items() if weight is not None}
    return {name: matrix.by_rows() for name, matrix in matrices.items() if isinstance(matrix, QuantizedMatrix)}


def same_quantized(a: Llama, b: Llama) -> bool:
    found, expected = all_quantized(a), all_quantized(b)
    return found.keys() == expected.keys() and all(
        torch.equal(found[n].words, expected[n].words) and torch.equal(found[n].scales, expected[n].scales)
        for n in expected
    )


def check_same(plain: str, stored: str, quantization: str) -> None:
    rounded = Llama.build(plain, **OPTIONS, quantization=quantization)
    loaded = Llama.build(stored, **OPTIONS)
    assert all_quantized(rounded) and same_quantized(loaded, rounded)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens), rounded.model(tokens))
