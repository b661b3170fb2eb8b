"""The table of checkpoint formats: one record each, made in the format's own file.

To add a format, from inside or outside of the package, put its `CheckpointFormat` into FORMATS: from then on it is
found, loaded, inspected and converted to and from. Knows no format's details.
"""

from . import huggingface, meta
from .checkpoint import CheckpointFormat

FORMATS: dict[str, CheckpointFormat] = {"meta": meta.FORMAT, "hf": huggingface.FORMAT}
