"""Fine-tuning: data, steps, gradients, evaluation, and what survives a kill."""
