"""Predictions of task heads against transformers' models of the same task, which get one text or window at a time.

The engine reads with this project's network, which has transformers' weights; the heads are transformers' layers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_program import Own, results
from conftest import make_twin, numbers_in, to_meta
from published_tokenizers import FAMILIES, PARAGRAPH, save
from rank_pool import RankPool
from tiny import ARGS, write_checkpoint
from tokenizers import processors
from torch import Tensor, nn

from llama import LlamaError, ModelArgs, Transformer
from llama.checkpoints.task_spec import HeadConfig
from llama.engine.engine import Engine
from llama.parallel import Place
from llama.tasks.predict import COMPARED, Answer, Label, answer, answer_all, classify, tag
from llama.tasks.spans import collect_tagged_spans
from llama.tokenization.hf_tokenizer import HFTokenizer
from llama.tokenization.protocol import AnyTokenizer
from llama.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox",
    "a",
    PARAGRAPH[:120],
    "Ça va? Größe, naïve, 中文字符, emoji 😀",
    "It's what they'll say",
]
TAGS = ("O", "B-X", "I-X", "B-Y", "I-Y")


class Head(nn.Module):
    """The layer of a model of transformers in place of a head. `model` is transformers' network before it."""

    def __init__(self, model: Any, output: nn.Module, labels: tuple[str, ...], problem_type: str) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.config = HeadConfig(labels, problem_type)

    def compute_logits(self, h: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return self.output(h)


@dataclass(frozen=True)
class World:
    ours: HFTokenizer
    theirs: Any  # transformers' tokenizer of the same files


@pytest.fixture(scope="module", params=["llama3", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, place: Place) -> World:
    """One tokenizer that puts a token before each text of a pair, and one that puts none."""
    from transformers import PreTrainedTokenizerFast

    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("answering")
    made = family.make()
    if request.param == "llama3":
        bos = "<|begin_of_text|>"
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return World(HFTokenizer(save(folder, made, family.config)), PreTrainedTokenizerFast.from_pretrained(folder))


@cache
def network(task: str, outputs: int) -> Any:
    """transformers' network for a task: small and random, with weights large enough for varied predictions."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=outputs, pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    model = getattr(transformers, f"LlamaFor{task}")(config).eval()
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3, generator=random)
    return model


def head_of(task: str, labels: tuple[str, ...] = TAGS, problem_type: str = "single_label_classification") -> Head:
    model = network(task, 2 if task == "QuestionAnswering" else len(labels))
    body = model.transformer if task == "QuestionAnswering" else model.model
    output = model.qa_outputs if task == "QuestionAnswering" else model.score
    return Head(body, output, labels, problem_type)


def read_with(model: Transformer, tokenizer: AnyTokenizer) -> Engine:
    return Engine(model, tokenizer, 1, 2048, None)


BODY = ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=512, multiple_of=64, ffn_dim_multiplier=0.7, norm_eps=1e-6)


def engine_of(head: Head, tokenizer: AnyTokenizer, max_seq_len: int = 512, max_batch_size: int = 3) -> Engine:
    """What reads with the weights of the network before a head."""
    sizes = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    ours = Transformer(replace(BODY, rope_theta=10000, tied_embeddings=True, **sizes))
    tensors = {f"model.{name}": tensor for name, tensor in head.model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    ours.load_state_dict(to_meta(tensors, BODY))
    return read_with(ours, tokenizer)


def note_passes(engine: Engine) -> list[tuple[int, int]]:
    """(rows, tokens of the longest) of each pass from now on."""
    passes: list[tuple[int, int]] = []
    engine.model.tok_embeddings.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape)))
    return passes


class Scripted(nn.Module):
    """A head with fixed logits for each token id; other ids get the default. It reads states of `engine_of_tokens`."""

    def __init__(self, starts: dict[int, float], ends: dict[int, float], default: float = 0.0) -> None:
        super().__init__()
        table = torch.full((512, 2), default)
        for column, known in enumerate((starts, ends)):
            for token, logit in known.items():
                table[token, column] = logit
        self.table = nn.Embedding.from_pretrained(table)
        self.seen: list[list[int]] = []

    def compute_logits(self, h: Tensor) -> Tensor:
        tokens = h.argmax(-1)
        self.seen.append(tokens.tolist())
        return self.table(tokens)


def engine_of_tokens(tokenizer: AnyTokenizer, max_seq_len: int = 512, max_batch_size: int = 3) -> Engine:
    """What reads with a network without layers, in whose states the largest number is that of the token."""
    sizes = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    model = Transformer(ModelArgs(dim=512, n_layers=0, n_heads=8, vocab_size=512, tied_embeddings=True, **sizes))
    nn.init.eye_(model.tok_embeddings.weight)
    return read_with(model, tokenizer)


class Untouched(nn.Module):
    config = HeadConfig(TAGS, "single_label_classification")

    def compute_logits(self, h: Tensor) -> Tensor:
        raise AssertionError("a forward pass")


# --- labels ----------------------------------------------------------------------------------------------------------


def close(labels: list[Label], expected: list[tuple[str, float]]) -> bool:
    return [one.label for one in labels] == [label for label, _ in expected] and [one.score for one in labels] == (
        pytest.approx([score for _, score in expected], abs=1e-5)
    )


@pytest.mark.parametrize("max_batch_size", [1, 2, 20])
@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_labels_are_transformers(world: World, problem_type: str, max_batch_size: int) -> None:
    from transformers.pipelines import pipeline

    head = head_of("SequenceClassification", ("a", "b", "c", "d", "e"), problem_type)
    model = network("SequenceClassification", 5)
    model.config.id2label = dict(enumerate(head.config.labels))
    model.config.problem_type = problem_type
    theirs = pipeline("text-classification", model=model, tokenizer=world.theirs, device="cpu", top_k=None)
    results = classify(engine_of(head, world.ours, 512, max_batch_size), head, TEXTS)
    assert len(results) == len(TEXTS)
    for text, labels in zip(TEXTS, results, strict=True):
        scores = {one["label"]: one["score"] for one in theirs([text])[0]}
        best = max(scores, key=lambda label: scores[label])
        expected = {
            "single_label_classification": [(best, scores[best])],
            "multi_label_classification": [(label, scores[label]) for label in "abcde" if scores[label] >= 0.5],
            "regression": [(label, scores[label]) for label in "abcde"],
        }
        assert close(labels, expected[problem_type])
    assert len({tuple(one.label for one in labels) for labels in results}) > 1 or problem_type == "regression"


def test_the_longest_texts_go_first(world: World) -> None:
    head = head_of("SequenceClassification")
    engine = engine_of(head, world.ours)
    passes = note_passes(engine)
    classify(engine, head, ["a", "a " * 30, "a " * 28, "a", "a " * 29])
    assert [rows for rows, _ in passes] == [3, 2]
    assert [length for _, length in passes] == sorted([length for _, length in passes], reverse=True)


def test_one_text_at_a_time_and_the_other_tokenizer(small: Tokenizer, place: Place) -> None:
    """With the project's own network."""
    head = Own(make_twin(replace(ARGS, max_seq_len=64, max_batch_size=3)).ours, 3)
    texts = ["in the", "user", "é中😀", "the user in the user"]
    for text, (label,) in zip(texts, classify(read_with(head.network, small), head, texts), strict=True):  # type: ignore[arg-type]
        tokens = torch.tensor([small.encode(text, bos=True, eos=False)])
        with torch.no_grad():
            chances = head.output(head.network.hidden_states(tokens)[0, -1]).softmax(-1)
        best = int(chances.argmax())
        assert label == Label(head.config.labels[best], pytest.approx(float(chances[best]), abs=1e-5))


# --- tags ------------------------------------------------------------------------------------------------------------


def test_spans_are_transformers(world: World) -> None:
    from transformers.pipelines import pipeline

    head, model = head_of("TokenClassification"), network("TokenClassification", len(TAGS))
    model.config.id2label = dict(enumerate(TAGS))
    theirs = pipeline(
        "token-classification", model=model, tokenizer=world.theirs, device="cpu", aggregation_strategy="simple"
    )
    results = tag(engine_of(head, world.ours), head, TEXTS[:3], whole_words=False)
    for text, spans in zip(TEXTS[:3], results, strict=True):
        assert [span.text for span in spans] == [text[span.start : span.end] for span in spans]
        groups = [one for one in theirs(text) if text[one["start"] : one["end"]].strip()]
        assert [(span.text, span.label) for span in spans] == [
            (text[one["start"] : one["end"]].strip(), one["entity_group"]) for one in groups
        ]
        assert [span.score for span in spans] == pytest.approx([float(one["score"]) for one in groups], abs=1e-5)
    assert sum(map(len, results)) > 20


@pytest.mark.parametrize("max_batch_size", [1, 4])
def test_long_texts_are_tagged_in_windows(world: World, max_batch_size: int) -> None:
    """A token gets its label from the first window that has it; computed by hand here."""
    head, size = head_of("TokenClassification"), 21
    engine = engine_of(head, world.ours, size, max_batch_size)
    passes = note_passes(engine)
    results = tag(engine, head, [TEXTS[1], PARAGRAPH, TEXTS[2]], whole_words=False)
    assert max(length for _, length in passes) == size
    encoding = world.theirs(PARAGRAPH, add_special_tokens=False, return_offsets_mapping=True)
    prefix = world.theirs("").input_ids
    room = size - len(prefix)
    labels, scores = [], []
    for i in range(len(encoding.input_ids)):
        start = 0
        while start + room <= i:
            start += room - room // 2
        row = torch.tensor([[*prefix, *encoding.input_ids[start : i + 1]]])  # what follows changes nothing
        with torch.no_grad():
            chances = head.output(head.model(input_ids=row).last_hidden_state)[0, -1].softmax(-1)
        labels.append(TAGS[int(chances.argmax())])
        scores.append(float(chances.max()))
    expected = collect_tagged_spans(labels, scores, encoding.offset_mapping, PARAGRAPH)
    assert [(span.start, span.end, span.label) for span in results[1]] == [
        (span.start, span.end, span.label) for span in expected
    ]
    assert [span.score for span in results[1]] == pytest.approx([span.score for span in expected], abs=1e-5)


# --- answers ---------------------------------------------------------------------------------------------------------

QUESTION = "Who jumps over what?"


@dataclass(frozen=True)
class Theirs:
    """A window as transformers encodes it."""

    tokens: list[int]
    starts: Tensor  # float64 (T), -inf outside the context
    ends: Tensor
    null: float
    offsets: list[tuple[int, int]]


def their_windows(world: World, head: Head, context: str, size: int, stride: int) -> Iterator[Theirs]:
    encoding = world.theirs(
        QUESTION, context, truncation="only_second", max_length=size, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    for i, tokens in enumerate(encoding.input_ids):
        with torch.no_grad():
            logits = head.output(head.model(input_ids=torch.tensor([tokens])).last_hidden_state)[0].double()  # (T, 2)
        ours = torch.tensor([one == 1 for one in encoding.sequence_ids(i)])
        ours &= torch.tensor([context[start:end].strip() != "" for start, end in encoding.offset_mapping[i]])
        masked = logits.masked_fill(~ours[:, None], -math.inf)
        yield Theirs(tokens, *masked.unbind(1), float(logits[0].sum()), encoding.offset_mapping[i])


@pytest.mark.parametrize("size, stride, most", [(512, 128, 30), (60, 20, 7), (33, 0, 3), (40, 17, 200)])
def test_answers_by_hand(world: World, size: int, stride: int, most: int) -> None:
    """All spans of all of transformers' windows are compared."""
    head = head_of("QuestionAnswering")
    best: dict[tuple[int, int], float] = {}
    seen = list(their_windows(world, head, PARAGRAPH, size, stride))
    assert len(seen) == 1 or size < 512
    for window in seen:
        for i in range(len(window.tokens)):
            for j in range(i, min(i + most, len(window.tokens))):
                score = float(window.starts[i] + window.ends[j])
                begin, stop = window.offsets[i][0], window.offsets[j][1]
                text = PARAGRAPH[begin:stop]
                place = begin + len(text) - len(text.lstrip()), stop - len(text) + len(text.rstrip())
                if score > -math.inf:
                    best[place] = max(best.get(place, score), score)
    ranked = sorted(best, key=lambda place: -best[place])[:COMPARED]
    null = min(window.null for window in seen)
    options: dict[str, Any] = {"doc_stride": stride, "max_answer_tokens": most}

    results = answer(engine_of(head, world.ours, size, 4), head, QUESTION, PARAGRAPH, n_best=5, **options)
    assert [(one.start, one.end) for one in results] == ranked[:5]
    assert all(one.text == PARAGRAPH[one.start : one.end] == one.text.strip() != "" for one in results)
    total = math.fsum(math.exp(best[place]) for place in ranked)
    assert [one.score for one in results] == pytest.approx(
        [math.exp(best[one]) / total for one in ranked[:5]], abs=1e-5
    )
    assert (best[ranked[0]] - best[ranked[1]]) > 1e-4, "the numbers tell them apart"

    gap = null - best[ranked[0]]
    total += math.exp(null)
    for threshold, none in ((gap - 0.01, True), (gap + 0.01, False)):
        engine = engine_of(head, world.ours, size, 2)
        results = answer(engine, head, QUESTION, PARAGRAPH, null_threshold=threshold, **options)
        expected, logit = (Answer("", 0, 0, 0), null) if none else (Answer("", *ranked[0], 0), best[ranked[0]])
        assert [(one.start, one.end) for one in results] == [(expected.start, expected.end)]
        assert results[0].score == pytest.approx(math.exp(logit) / total, abs=1e-5)


def test_the_best_span_by_log_probabilities(world: World) -> None:
    """With a single window, transformers defines the scores by softmax over starts and over ends."""
    head = head_of("QuestionAnswering")
    (window,) = their_windows(world, head, PARAGRAPH, 512, 0)
    chances = window.starts.log_softmax(-1)[:, None] + window.ends.log_softmax(-1)  # (T, T)
    chances = chances.exp().triu().tril(29)
    i, j = divmod(int(chances.argmax()), len(window.tokens))
    (results,) = answer(engine_of(head, world.ours), head, QUESTION, PARAGRAPH)
    assert results.text == PARAGRAPH[window.offsets[i][0] : window.offsets[j][1]].strip()


def test_what_a_head_reads_is_a_pair_of_transformers(world: World) -> None:
    head = Scripted({}, {})
    answer(engine_of_tokens(world.ours, 50, 1), head, QUESTION, PARAGRAPH, doc_stride=11)
    theirs = list(their_windows(world, head_of("QuestionAnswering"), PARAGRAPH, 50, 11))
    assert sorted(head.seen) == sorted(window.tokens for window in theirs)


def test_pairs_in_their_order_whatever_the_batch(world: World) -> None:
    head = head_of("QuestionAnswering")
    pairs = [("What?", PARAGRAPH), ("Who is it?", "the fox"), (QUESTION, PARAGRAPH[100:300]), ("a", "😀 and 中文")]
    options: dict[str, Any] = {"doc_stride": 9, "n_best": 3, "null_threshold": 0.0}
    alone_engine = engine_of(head, world.ours, 45, 1)
    expected = [answer(alone_engine, head, *pair, **options) for pair in pairs]
    for max_batch_size in (2, 7, 100):
        results = answer_all(engine_of(head, world.ours, 45, max_batch_size), head, pairs, **options)
        for ours, alone in zip(results, expected, strict=True):
            assert [(one.text, one.start, one.end) for one in ours] == [(one.text, one.start, one.end) for one in alone]
            assert [one.score for one in ours] == pytest.approx([one.score for one in alone], abs=1e-5)
    assert answer_all(alone_engine, head, []) == []


def test_only_tokens_of_the_context_answer(world: World) -> None:
    """Only spans of the context are answers, although tokens of the question and before texts have larger logits."""
    context = world.ours.encode("box a", bos=False, eos=False)
    others = [*world.ours.encode("fun?", bos=True, eos=False), *world.ours.encode("", bos=True, eos=False)]
    assert not {*context} & {*others}
    high = dict.fromkeys(others, 9.0) | {context[-1]: 3.0}
    results = answer(engine_of_tokens(world.ours), Scripted(high, high), "fun?", "box a", n_best=100)
    seen = [i for i, token in enumerate(context) if world.ours.decode([token]).strip()]
    assert len(results) == len(seen) * (len(seen) + 1) // 2
    assert results[0].text == "a" and results[0].end == 5


def test_one_answer_of_several_tokens_or_windows_counts_once(small: Tokenizer, place: Place) -> None:
    """Each byte of the character is a token, whose offsets are those of the whole character."""
    parts = small.encode("文", bos=False, eos=False)
    assert len(parts) > 1
    head = Scripted(dict.fromkeys(parts, 5.0), dict.fromkeys(parts, 5.0), -5.0)
    results = answer(engine_of_tokens(small, 10, 2), head, "a", "bcd文efg", doc_stride=5, n_best=30)
    assert (results[0].text, results[0].start, results[0].end) == ("文", 3, 4)
    assert len({(one.start, one.end) for one in results}) == len(results)
    assert math.fsum(one.score for one in results) == pytest.approx(1)
    assert results[0].score > 0.99


def test_an_answer_has_no_white_space_at_its_ends(small: Tokenizer, place: Place) -> None:
    spaces = {token: 9.0 for text in (" ", "  ", "    ", "\n\n") for token in small.encode(text, bos=False, eos=False)}
    engine, head = engine_of_tokens(small), Scripted(spaces, spaces)
    assert answer(engine, head, "a", "    b  c\n\n") == [Answer("b", 4, 5, pytest.approx(1 / 3))]
    assert answer(engine, head, "a", " the  ") == [Answer("the", 1, 4, 1.0)]


def test_no_answer_is_the_least_of_all_windows(small: Tokenizer, place: Place) -> None:
    class ContextWindow(Scripted):
        def compute_logits(self, h: Tensor) -> Tensor:
            logits = super().compute_logits(h)
            logits[0, 0] = -5.0 if z in h.argmax(-1) else 5.0
            return logits

    (z,) = small.encode("z", bos=False, eos=False)
    options: dict[str, Any] = {"doc_stride": 0, "null_threshold": 0.0}
    engine, head = engine_of_tokens(small, 8, 4), ContextWindow({}, {})
    none, some = (answer(engine, head, "a", context, **options) for context in ("bcdefghi", "bcdefghz"))
    compared = COMPARED + math.exp(5)
    assert none == [Answer("", 0, 0, pytest.approx(math.exp(5) / compared))]
    assert some == [Answer("b", 0, 1, pytest.approx(1 / (COMPARED + math.exp(-5))))]
    both = answer(engine, head, "a", "bcdefghi", n_best=2, **options)
    assert both == [*none, Answer("b", 0, 1, pytest.approx(1 / compared))]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(world: World) -> Any:
    """Refused before any forward pass."""

    def refuse(use: Any, *args: Any, max_seq_len: int = 512, **options: Any) -> str:
        engine = engine_of_tokens(world.ours, max_seq_len, 2)
        passes = note_passes(engine)
        with pytest.raises(LlamaError) as caught:
            use(engine, Untouched(), *args, **options)
        assert not passes
        return str(caught.value)

    return refuse


def test_texts_that_are_none(untouched: Any) -> None:
    for use in (classify, tag):
        assert "text 1 is empty" in untouched(use, ["a", ""])
        assert "expected a list of strings" in untouched(use, "text")
        assert "expected a list of strings" in untouched(use, [1])


def test_texts_that_are_too_long(world: World, untouched: Any) -> None:
    length = len(world.ours.encode(PARAGRAPH, bos=True, eos=False))
    message = untouched(classify, ["a", PARAGRAPH], max_seq_len=30)
    assert {"1", str(length), "30"} <= numbers_in(message)
    if world.ours.encode("", bos=True, eos=False):
        message = untouched(tag, ["a"], max_seq_len=1)
        assert "1 tokens, which leaves no room for a text within max_seq_len 1" in message


def test_questions_that_are_none(world: World, untouched: Any) -> None:
    assert "question 0 is empty" in untouched(answer, "", "the fox")
    assert "context 0 is empty" in untouched(answer, "what?", "")
    assert "context 1 has no token but white space" in untouched(answer_all, [("a", "b"), ("a", " \n ")])
    assert "expected a list of strings" in untouched(answer, 3, "the fox")
    assert "expected (question, context)" in untouched(answer_all, ["ab", ("a",)])
    assert "pairs is a str" in untouched(answer_all, "ab")
    asked = len(world.ours.encode(QUESTION, bos=True, eos=False)) + len(world.ours.encode("", bos=True, eos=False))
    message = untouched(answer, QUESTION, "the fox", max_seq_len=asked)
    assert {str(asked)} <= numbers_in(message) and "no room" in message
    message = untouched(answer, QUESTION, PARAGRAPH, max_seq_len=asked + 10, doc_stride=10)
    assert "windows of 10 tokens can't overlap by doc_stride 10" in message


@pytest.mark.parametrize(
    "options",
    [
        {"doc_stride": -1},
        {"doc_stride": 1.5},
        {"max_answer_tokens": 0},
        {"n_best": True},
        {"null_threshold": math.nan},
        {"null_threshold": "0"},
    ],
)
def test_settings_out_of_range(untouched: Any, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    assert f"{name} is {value!r}, expected" in untouched(answer, "what?", "the fox", **options)


def test_logits_that_are_not_finite(world: World) -> None:
    token = world.ours.encode("x", bos=False, eos=False)[0]
    head = Scripted({token: math.nan}, {})
    with pytest.raises(LlamaError, match=r"text 1: the logits are not finite in torch\.float32"):
        answer_all(engine_of_tokens(world.ours), head, [("a", "b"), ("a", "x")])


def test_two_ranks_are_one(pool: RankPool, place: Place, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    one, two = results(str(directory)), pool.run(results, str(directory), ranks=2).results
    assert two[0] == two[1]
    assert two[0].pop("refused") == "rank 1: text 0 is empty: give it at least one character"
    assert one.pop("refused") == ""
    assert one["labels"] and one["answers"] and any(one["spans"])
    for name, scored in one.items():
        for ours, other in zip(flat(scored), flat(two[0][name]), strict=True):
            assert other == ours | {"score": pytest.approx(ours["score"], abs=1e-5)}


def flat(results: list[Any]) -> list[dict[str, Any]]:
    return [one for several in results for one in (several if isinstance(several, list) else [several])]
