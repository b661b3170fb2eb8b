"""Directories <-> tensors: the formats of checkpoints, the families of models, how ranks divide a model, what fits."""
