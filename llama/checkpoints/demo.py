"""Where the demo model is: the checkpoint that commands use if none was named."""

from pathlib import Path

from ..errors import LlamaError

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"


def demo_checkpoint() -> str:
    """The demo model's directory. Raises LlamaError if it isn't installed."""
    if not DEMO.is_dir():
        raise LlamaError(f"no --ckpt_dir was given and the demo model is not at {DEMO}: pass --ckpt_dir")
    return str(DEMO)
