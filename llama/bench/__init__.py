"""`python -m llama bench`: how fast a model runs here. Loaded by nothing else."""
