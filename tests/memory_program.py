"""What tests/test_memory.py and benchmarks/loading.py run on ranks: loads checkpoints and says what it took.

    torchrun --nproc_per_node M tests/memory_program.py OUTPUT DTYPE CKPT_DIR...

Writes to OUTPUT.RANK, as JSON, for each directory: seconds, and the bytes of private memory at their peak.
"""

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from llama import parallel
from llama.checkpoint import load_model, open_checkpoint
from llama.measure import Peak


def main(output: str, dtype: str, *directories: str) -> None:
    place = parallel.initialize(device="cpu", dtype=dtype)
    results = []
    for directory in directories:
        started = time.perf_counter()
        with Peak() as peak:
            checkpoint = open_checkpoint(directory)
            model = load_model(checkpoint, replace(checkpoint.sizes, max_seq_len=8, max_batch_size=1), place)
        results.append({"seconds": time.perf_counter() - started, "peak": peak.private})
        results[-1]["shard"] = sum(p.nbytes for p in model.parameters())
        del model, checkpoint
        gc.collect()
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
