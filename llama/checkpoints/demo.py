"""Where the demo model is: the checkpoint that commands use if none was named."""

from pathlib import Path

from ..errors import LlamaError

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE.parent / "demo" / "model", PACKAGE / "demo_model")  # in a checkout; in an installed package


def find_demo() -> Path | None:
    """The demo model's directory; None if it isn't installed."""
    return next((place for place in PLACES if (place / "params.json").is_file()), None)


def demo_checkpoint() -> str:
    """The demo model's directory. Raises LlamaError if it isn't installed."""
    if (place := find_demo()) is not None:
        return str(place)
    looked = " or ".join(map(str, PLACES))
    raise LlamaError(f"no ckpt_dir was given and the demo model is not at {looked}: give --ckpt_dir (ckpt_dir=...)")
