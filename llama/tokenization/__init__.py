"""Text <-> ids by a Hugging Face tokenizer.json, and dialogs by the model's chat template."""
