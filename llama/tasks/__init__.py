"""Task heads on the Transformer, and what is read out of their logits."""
