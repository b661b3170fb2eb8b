"""Low-rank adapters on a built model, and their files as peft writes them."""
