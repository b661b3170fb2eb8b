"""A small vocabulary as tokenizers' BPE trainer makes it: GPT-2's letters for bytes, and some words of one sentence."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_byte_level() -> Tokenizer:
    """280 words, so that added tokens have the ids from 280 on."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the sea is blue and the sky is high"], trainer)
    return made
