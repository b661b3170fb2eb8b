"""How much of a thread's stack the attention of csrc/attention.c takes, by its arrays there.

More than a thread has ends the process, so whoever calls it asks here first. Knows sizes; knows no tensors.
"""

import functools

# Threads have 8 MB by default on Linux, 2 MB where no limit is set, and less where a user says so.
MOST_SCRATCH = 1 << 20
BLOCK, FLOAT_ROWS, FEW, QUERIES = 64, 6, 4, 256  # as in csrc/
TILE_BYTES = 512  # of a QueryTile, at most


@functools.cache
def attention_scratch(heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes that a thread takes at most for heads of this rank. itemsize: bytes of a number of the model."""
    group = heads // kv_heads
    once = 2 * round_up(group, FEW) * head_dim * 4 + head_dim * itemsize  # `attend_head`
    rows = round_up(-(-QUERIES // group) * group, FLOAT_ROWS)  # `attend_block`
    padded = round_up(head_dim, BLOCK)
    sums, queries = rows * padded * 4, rows * head_dim * itemsize
    keys, values = head_dim * BLOCK * itemsize, padded * BLOCK * itemsize
    return max(once, sums + queries + keys + values + rows // FLOAT_ROWS * TILE_BYTES)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
