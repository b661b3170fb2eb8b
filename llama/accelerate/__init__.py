"""The fast form of a built model: packed and quantized matrices, kernels, captured decode steps."""
