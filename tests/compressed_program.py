"""What test_compressed_tensors.py runs on ranks: a checkpoint quantized by loading, and one stored so.

torchrun --nproc_per_node N tests/compressed_program.py PLAIN STORED QUANTIZATION
"""

import sys

import torch
from test_compressed_tensors import OPTIONS, all_quantized, same_quantized

from llama import Llama


def main(plain: str, stored: str, quantization: str) -> None:
    rounded = Llama.build(plain, **OPTIONS, quantization=quantization)
    loaded = Llama.build(stored, **OPTIONS)
    assert all_quantized(rounded) and same_quantized(loaded, rounded)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens), rounded.model(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
