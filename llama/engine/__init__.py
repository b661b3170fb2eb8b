"""Many sequences, one loop: requests, prefill, decoding, proposals, beams, scores. Knows no file and no kernel."""

from .pass_rows import rows as rows
