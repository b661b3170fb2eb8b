"""What it costs a model with a fast form that somebody has read its parameters, or saved it: time, and memory kept.

    python -m benchmarks.reading [--ckpt_dir DIR] [--repeats 30] [--quantization int8]

Models take turns, so that what slows the machine slows all of them; ratios are to a model that nobody reached inside.
"""

import argparse
import ctypes
import gc
import io
import statistics
import sys
import time
from collections.abc import Callable

import torch

from llama import Llama, Transformer
from llama.bench.measure import status_bytes
from llama.cli.program import checkpoint_or_demo, errors_in_one_line

TOKENS = 64


def read_shapes(model: Transformer) -> None:
    assert all(parameter.numel() for parameter in model.parameters())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save(model: Transformer) -> None:
    torch.save(model.state_dict(), io.BytesIO())


def walk(model: Transformer) -> None:
    assert [type(module) for module in model.modules()]


READS: dict[str, Callable[[Transformer], None]] = {
    "untouched": lambda model: None,
    "untouched again": lambda model: None,
    "shapes read": read_shapes,
    "state dict saved": save,
    "modules walked": walk,
}


def memory_in_use() -> int:
    """Bytes of this process, without what the C library keeps of freed memory."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("RssAnon") or 0


def generate(llama: Llama, prompt: list[int]) -> None:
    llama.tokenizer.stop_tokens = set()
    llama.generate([prompt], TOKENS, temperature=0)


@torch.no_grad()
def forward_by_hand(llama: Llama, prompt: list[int]) -> None:
    token = torch.tensor([prompt[:1]])
    for position in range(TOKENS):
        llama.model(token, position)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_dir")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quantization")
    options = parser.parse_args()
    build = {"max_seq_len": 2 * TOKENS, "max_batch_size": 1, "device": "cpu", "quantization": options.quantization}
    llamas = {name: Llama.build(checkpoint_or_demo(options.ckpt_dir), **build) for name in READS}
    prompt = llamas["untouched"].tokenizer.encode("The capital of France is", bos=True, eos=False)
    for llama in llamas.values():
        generate(llama, prompt), forward_by_hand(llama, prompt)
    kept = {}
    for name, read in READS.items():
        before = memory_in_use()
        read(llamas[name].model)
        llamas[name].model.refresh()
        kept[name] = memory_in_use() - before
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.repeats):
        for work in (generate, forward_by_hand):
            for name, llama in llamas.items():
                started = time.perf_counter()
                work(llama, prompt)
                seconds.setdefault((work.__name__, name), []).append(time.perf_counter() - started)
    print(f"{'':18} {'generate 64':>12} {'64 forwards':>12} {'memory kept':>12}   (ratios of medians to untouched)")
    for name in READS:
        ratios = [
            statistics.median(seconds[work, name]) / statistics.median(seconds[work, "untouched"])
            for work in ("generate", "forward_by_hand")
        ]
        print(f"{name:18} {ratios[0]:>12.3f} {ratios[1]:>12.3f} {kept[name] / 1e6:>9.2f} MB")
    for work in ("generate", "forward_by_hand"):
        print(f"{work}: {1e3 * statistics.median(seconds[work, 'untouched']):.1f} ms untouched")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
