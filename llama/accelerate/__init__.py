"""The fast form of a built model: packed and quantized matrices, kernels, recorded decode steps."""
