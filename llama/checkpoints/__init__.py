"""A directory <-> tensors: the formats, the families, how ranks divide a model, what fits."""
