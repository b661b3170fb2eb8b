"""What tests/test_memory.py and benchmarks/loading.py run on ranks: loads checkpoints and says what it took.

    torchrun --nproc_per_node M tests/memory_program.py OUTPUT DTYPE CKPT_DIR...

Writes to OUTPUT.RANK, as JSON, for each directory: seconds, and the bytes of private memory at their peak.
"""

import gc
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from llama import parallel
from llama.checkpoint import load_model, open_checkpoint


def private_bytes() -> int:
    """Memory of this process alone: not what it has mapped from files, which the kernel may drop and read again."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class Peak:
    """The most private memory while in this context, looked at every other millisecond."""

    def __enter__(self) -> "Peak":
        self.bytes, self._stop = private_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, private_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, private_bytes())


def main(output: str, dtype: str, *directories: str) -> None:
    place = parallel.initialize(device="cpu", dtype=dtype)
    results = []
    for directory in directories:
        started = time.perf_counter()
        with Peak() as peak:
            checkpoint = open_checkpoint(directory)
            model = load_model(checkpoint, replace(checkpoint.sizes, max_seq_len=8, max_batch_size=1), place)
        results.append({"seconds": time.perf_counter() - started, "peak": peak.bytes})
        results[-1]["shard"] = sum(p.nbytes for p in model.parameters())
        del model, checkpoint
        gc.collect()
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
