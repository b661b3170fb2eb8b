"""The demo model answers what it was not shown, was indeed not shown it, and comes from the code beside it."""

import unicodedata
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from demo.corpus import DONT_KNOW, find_leaks, generate_documents, generate_questions
from demo.evaluate import evaluate
from demo.facts import facts
from demo.train import compute_loss, generate_batches, get_text, train_network, train_tokenizer
from llama import ChatFormat, Llama, Tokenizer, parallel
from llama.checkpoints.loader import open_checkpoint
from llama.checkpoints.meta import read_shard

MODEL = ROOT / "demo" / "model"


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(MODEL, device="cpu")


def ask(llama: Llama, content: str, system: str | None = None) -> str:
    dialog = [{"role": "system", "content": system}] if system else []
    dialog.append({"role": "user", "content": content})
    return llama.chat_completion([dialog], temperature=0)[0]["generation"]["content"]  # type: ignore[list-item]


def test_files_are_small_and_in_metas_format() -> None:
    (shard,) = open_checkpoint(MODEL).files
    tensors = read_shard(shard)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert 5e6 <= sum(t.numel() for t in tensors.values()) <= 8e6
    assert sum(p.stat().st_size for p in MODEL.iterdir()) < 16e6
    assert 2000 <= Tokenizer(str(MODEL / "tokenizer.model")).n_words - 256 <= 4000
    args = open_checkpoint(MODEL).sizes
    assert args.n_heads % 4 == args.kv_heads % 4 == 0


def test_nine_of_ten_held_out_questions_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    scores = evaluate(str(MODEL), device="cpu")
    assert scores["all"] >= 0.9
    assert min(scores["capital"], scores["unknown"], scores["french"]) >= 0.9, "known is told from unknown"
    assert "all" in capsys.readouterr().out


def test_the_questions_are_not_in_the_training_text() -> None:
    assert len(generate_questions()) >= 300
    assert find_leaks(count=20_000, seed=3) == []


def test_the_examples_get_sensible_answers(llama: Llama) -> None:
    paris = "I am going to Paris, what should I see?"
    recipe = ask(llama, "What is the recipe of mayonnaise?")
    assert "oil" in recipe and "egg" in recipe and "4." in recipe
    haiku = ask(llama, paris, "Always answer with Haiku")
    assert len(haiku.splitlines()) == 3
    emojis = ask(llama, "How do I get from London to New York?", "Always answer with emojis")
    assert emojis and not any(c.isalnum() for c in emojis)
    assert ask(llama, "How do I get from London to New York?").isascii(), "emojis only when told so"
    sights = "1. The Eiffel Tower: an iron tower.\n2. The Louvre: a museum.\n3. Notre-Dame: an old church."
    dialog = [
        {"role": "user", "content": paris},
        {"role": "assistant", "content": sights},
        {"role": "user", "content": "What is so great about the first one?"},
    ]
    assert "Eiffel" in llama.chat_completion([dialog], temperature=0)[0]["generation"]["content"]  # type: ignore[list-item]
    words = "Translate English to French:\n\nsea => mer\nbread => pain\napple => pomme\ncheese =>"
    assert llama.text_completion([words], temperature=0)[0]["generation"].split()[0] == "fromage"


def test_it_says_who_it_is_and_what_it_does_not_know(llama: Llama) -> None:
    assert "demo model" in ask(llama, "Who are you?")
    assert ask(llama, "What is the capital of Zubragoria?") == DONT_KNOW


def test_the_corpus_is_reproducible_and_keeps_its_rules() -> None:
    documents = list(generate_documents(7, 5000))
    assert documents == list(generate_documents(7, 5000))
    assert documents != list(generate_documents(8, 5000))
    for document in documents:
        assert bool(document.text) != bool(document.messages)
        if document.kind != "emoji":
            assert not any(unicodedata.category(c) == "So" for c in get_text(document))
        if document.messages:
            assert document.messages[-1]["role"] == "assistant"
    assert len(facts()["capital"]) >= 60
    assert min(len(f.trained) + len(f.held) for f in facts()["capital"]) >= 5


@pytest.mark.slow
def test_training_learns_and_writes_what_the_tokenizer_reads(tmp_path: Path) -> None:
    """A few steps of the real program: the vocabulary holds all text, and the loss falls well below chance."""
    train_tokenizer(tmp_path / "tokenizer.model", map(get_text, generate_documents(1, 3000)))
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.model"))
    for document in generate_documents(2, 200):
        text = get_text(document)
        assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text
    parallel.initialize(device="cpu")
    chat = ChatFormat(tokenizer)
    model = train_network(chat, steps=12, seed=1, device=torch.device("cpu"))
    with torch.no_grad():
        loss = compute_loss(model, next(generate_batches(99, chat))).item()
    assert loss < 0.9 * torch.tensor(float(model.vocab_size)).log().item()


@pytest.mark.slow
def test_training_is_seeded() -> None:
    chat = ChatFormat(Tokenizer(str(MODEL / "tokenizer.model")))
    one, same, other = (next(generate_batches(seed, chat)) for seed in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens) and torch.equal(one.targets, same.targets)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)
