"""Which control tokens a tokenizer.model stands for: the file is the same for Llama 3 and for Llama 3.1 and later.

Knows a model's sizes; reads no file.
"""

from ..model import ModelArgs

# (dim, n_layers) that Llama 3.1 and 3.2 brought: 405B, 1B, 3B. The others are Llama 3's too.
_NEW_SIZES = {(16384, 126), (2048, 16), (3072, 28)}


def is_llama_3_1(args: ModelArgs) -> bool:
    """Whether these are the sizes of Llama 3.1 or later: by Meta's `use_scaled_rope`, or by the sizes themselves."""
    has_scaled_rope = args.rope_scaling is not None and args.rope_scaling.type == "llama3"
    return has_scaled_rope or (args.dim, args.n_layers) in _NEW_SIZES
