"""Writes files of JSON lines, spoiled lines too: what tests of fine-tuning and of batches share."""

import json
from pathlib import Path
from typing import Any


def write(path: Path, lines: list[Any]) -> Path:
    """Write lines: bytes as they are, other values as JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path
