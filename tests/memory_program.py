"""What tests/test_memory.py and benchmarks/loading.py run on ranks: loads checkpoints and says what it took.

    torchrun --nproc_per_node M tests/memory_program.py OUTPUT plain|fast DTYPE CKPT_DIR...

Writes to OUTPUT.RANK, as JSON, for each directory: seconds, the bytes of private memory before and at their peak, and
of all that was resident, with the files' pages.
"""

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from llama import parallel
from llama.accelerate.accelerator import Accelerator
from llama.accelerate.layers import packed_weight
from llama.accelerate.quantization import PackedMatrix
from llama.bench.measure import PeakMemory, status_bytes
from llama.checkpoints.loader import load_model, open_checkpoint
from llama.model import Transformer


def main(output: str, form: str, dtype: str, *directories: str) -> None:
    place = parallel.initialize(device="cpu", dtype=dtype)
    results = []
    for directory in directories:
        started, before = time.perf_counter(), status_bytes("RssAnon")
        with PeakMemory() as peak:
            checkpoint = open_checkpoint(directory)
            args = replace(checkpoint.sizes, max_seq_len=8, max_batch_size=1)
            if form == "plain":
                model = load_model(checkpoint, args, place)
            else:
                accelerator = Accelerator()
                model = load_model(checkpoint, args, place, accelerator.pack_weight)
                accelerator.finish(model)
        results.append({"seconds": time.perf_counter() - started, "before": before})
        results[-1] |= {"peak": peak.private, "resident": peak.resident}
        results[-1]["shard"] = sum({id(t): t.nbytes for t in tensors_of(model)}.values())
        del model, checkpoint
        gc.collect()
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(results))


def tensors_of(model: Transformer) -> list[Tensor | PackedMatrix]:
    """What a model holds: packed matrices, and the parameters that are no such."""
    weights = [weight for module in model.modules() if (weight := packed_weight(module)) is not None]
    places = [own for module in model.modules() for own in [module._parameters]]
    plain = [value for own in places for value in dict.values(own) if isinstance(value, Tensor)]
    return [*plain, *(weight.packed for weight in weights)]


if __name__ == "__main__":
    main(*sys.argv[1:])
