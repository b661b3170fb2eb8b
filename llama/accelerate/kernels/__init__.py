"""Functions on tensors in C and in Triton, and the choice between them."""
