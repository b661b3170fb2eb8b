"""What a TaskModel predicts is read by an engine: from several threads, of any number of texts, with today's weights.

The oracle is the head's own `forward`, which has no KV cache, one text at a time.
"""

import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tokenizer
from tiny_heads import ENDINGS, make
from torch import Tensor

from llama import LlamaError, TaskModel
from llama.adapters.lora import Lora, add_lora
from llama.tasks.spans import collect_tagged_spans

WORDS = ["sun", "moon", "a", "The sea is wide.", "stars and stripes", "rain", "of", "snow on the hills of Rome"]
TEXTS = [f"{'AB'[i % 2]} {' '.join(WORDS[i % 8 :: (i % 3) + 1])}{'!' * (i % 5)}" for i in range(40)]
PAIRS = [(f"{'AB'[i % 2]}: where is {WORDS[i % 8]}?", text) for i, text in enumerate(TEXTS)]
PREDICT: dict[str, Callable[[TaskModel, int], Any]] = {  # of every other one of the inputs
    "classify": lambda model, first: model.classify(TEXTS[first::2]),
    "tag": lambda model, first: model.tag(TEXTS[first::2]),
    "answer": lambda model, first: model.answer_all(PAIRS[first::2], n_best=3, null_threshold=0.0, doc_stride=10),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for task in ENDINGS:
        make("llama", task).save_pretrained(root / task)
        write_tokenizer(root / task / "tokenizer.model")
    return root


@pytest.fixture
def build(made: Path) -> Callable[..., TaskModel]:
    def build(task: str, **options: Any) -> TaskModel:
        sizes = {"max_seq_len": 128, "max_batch_size": 4}
        return TaskModel.build(made / task, device="cpu", dtype="float32", **{**sizes, **options})

    return build


def assert_same(actual: list[list[Any]], expected: list[list[Any]], within: float = 1e-5) -> None:
    """Equal but for rounding of the scores."""
    assert [len(one) for one in actual] == [len(one) for one in expected]
    for ours, other in zip(chain(*actual), chain(*expected), strict=True):
        scores = ours.score, other.score
        assert vars(ours) == {**vars(other), "score": ours.score}
        assert scores[0] == pytest.approx(scores[1], abs=within)


@torch.no_grad()
def by_hand(model: TaskModel) -> list[tuple[str, float]]:
    """The likeliest label of each text and its score, from the head's `forward`."""
    found = []
    for text in TEXTS:
        chances = model.head(torch.tensor([model.tokenizer.encode(text, bos=True, eos=False)])).logits[0].softmax(-1)
        found.append((model.head.config.labels[int(chances.argmax())], float(chances.max())))
    return found


def assert_by_hand(model: TaskModel, within: float = 1e-5) -> None:
    labels, expected = list(chain(*model.classify(TEXTS))), by_hand(model)
    assert [one.label for one in labels] == [label for label, _ in expected]
    assert [one.score for one in labels] == pytest.approx([score for _, score in expected], abs=within)


# --- several threads, and any number of texts -------------------------------------------------------------------------


@pytest.mark.parametrize("task", PREDICT)
def test_threads_get_what_each_gets_alone(build: Callable[..., TaskModel], task: str) -> None:
    """Passes with the texts of one come between those of the other."""
    predict = PREDICT[task]
    alone = [predict(build(task, max_seq_len=96), first) for first in (0, 1)]
    model, together = build(task, max_seq_len=96), {}
    passes: list[set[int]] = []  # the letters that texts begin with which a pass reads
    both = threading.Barrier(2, timeout=60)
    bos = model.tokenizer.encode("", bos=True, eos=False)

    def note(_: Any, given: tuple[Tensor]) -> None:
        passes.append({row[1] for row in given[0].tolist() if row[:1] == bos})
        time.sleep(0.01)  # the other thread comes while this one's texts are read

    def run(first: int) -> None:
        both.wait()
        together[first] = predict(model, first)

    model.model.tok_embeddings.register_forward_pre_hook(note)
    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for first in (0, 1):
        assert_same(together[first], alone[first])
    first, second = ([i for i, letters in enumerate(passes) if letter in letters] for letter in b"AB")
    assert first[0] < second[-1] and second[0] < first[-1]


def test_more_texts_than_a_batch_holds(build: Callable[..., TaskModel]) -> None:
    for size in (1, 3, 5, 100):
        assert_by_hand(build("classify", max_batch_size=size))


@torch.no_grad()
def test_tags_and_answers_are_the_heads(build: Callable[..., TaskModel]) -> None:
    tagger, answerer = build("tag"), build("answer")
    for text, spans in zip(TEXTS, tagger.tag(TEXTS, whole_words=False), strict=True):
        ids = tagger.tokenizer.encode(text, bos=True, eos=False)
        best = tagger.head(torch.tensor([ids])).logits[0, 1:].softmax(-1).max(-1)
        names = [tagger.head.config.labels[i] for i in best.indices.tolist()]
        places = [(i, i + 1) for i in range(len(text))]  # a token is a byte
        assert_same([spans], [collect_tagged_spans(names, best.values.tolist(), places, text)])
    for (question, context), (best_answer,) in zip(PAIRS, answerer.answer_all(PAIRS, max_answer_tokens=1), strict=True):
        ids = [answerer.tokenizer.encode(text, bos=True, eos=False) for text in (question, context)]
        output = answerer.head(torch.tensor([ids[0] + ids[1]]))
        sums = (output.start_logits + output.end_logits)[0, len(ids[0]) + 1 :]
        allowed = torch.tensor([letter != " " for letter in context])
        assert best_answer.start == int(sums.masked_fill(~allowed, -torch.inf).argmax())


def test_a_call_within_a_step_is_refused(build: Callable[..., TaskModel]) -> None:
    model = build("classify")
    model.head.score.register_forward_hook(lambda *_: model.classify(["a"]))
    with pytest.raises(LlamaError, match="made a call to the Llama whose step calls it"):
        model.classify(TEXTS)
    model.head.score._forward_hooks.clear()
    assert_by_hand(model)


# --- training, and edits ----------------------------------------------------------------------------------------------


def train(model: TaskModel, rate: float) -> None:
    """One step that changes all that is trained."""
    parameters = [parameter for parameter in model.head.parameters() if parameter.requires_grad]
    tokens = torch.tensor([model.tokenizer.encode(text[:8].ljust(8), bos=True, eos=False) for text in TEXTS[:6]])
    model.head.train()
    model.head(tokens, labels=torch.arange(6) % 3).loss.backward()
    torch.optim.SGD(parameters, rate).step()
    model.head.zero_grad()
    model.head.eval()


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_predictions_are_of_the_weights_of_the_moment(build: Callable[..., TaskModel], kind: str) -> None:
    model = build("classify")
    if kind == "lora":
        add_lora(model.model, Lora(4, targets=("wq", "wv", "w2"), dropout=0.3), seed=1)
        model.head.score.weight.requires_grad_(True)
    seen = []
    for _ in range(3):
        assert_by_hand(model)
        seen.append(by_hand(model))
        train(model, 1.0)
    assert seen[0] != seen[1] != seen[2]
    model.model.layers[0].feed_forward.w1.weight.data.mul_(-2)
    assert_by_hand(model)
    model.head.score.weight.data.neg_()
    assert_by_hand(model)


def test_a_model_that_is_only_trained_has_no_cache(build: Callable[..., TaskModel]) -> None:
    model = build("classify")
    train(model, 0.1)
    assert model.model.kv_cache.n_slots == 0
    model.classify(["a"])
    assert model.model.kv_cache.n_slots > 0


def test_dropout_is_of_training_alone(build: Callable[..., TaskModel], made: Path) -> None:
    """A tagger in training mode leaves out states, as its `forward` does."""
    model = build("tag")
    model.head.config = type(model.head.config)(model.head.config.labels, None, 0.9)
    evaluated = model.tag(TEXTS)
    assert_same(model.tag(TEXTS), evaluated)
    model.head.train()
    torch.manual_seed(0)
    dropped = model.tag(TEXTS)
    assert dropped != evaluated and dropped != model.tag(TEXTS)
    model.head.eval()
    assert_same(model.tag(TEXTS), evaluated)


def test_predictions_within_autocast(build: Callable[..., TaskModel]) -> None:
    """There the KV cache holds numbers of another dtype, and none of them is used outside."""
    model = build("classify")
    exact = model.classify(TEXTS)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            rounded, expected = list(chain(*model.classify(TEXTS))), by_hand(model)
        assert [one.score for one in rounded] == pytest.approx([score for _, score in expected], abs=0.03)
        assert [one.score for one in rounded] != [one.score for one in chain(*exact)]
        assert_same(model.classify(TEXTS), exact)
