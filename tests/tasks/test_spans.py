"""Spans against an exhaustive search, windows against transformers' tokenizers, tags against transformers' pipeline."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from vocabulary import some

from llama.errors import LlamaError
from llama.tasks.spans import (
    Candidate,
    Span,
    align_labels_to_words,
    collect_tagged_spans,
    find_best_spans,
    merge_candidates,
    number_words,
    split_windows,
    strip_range,
)

few = st.sampled_from([-1.5, 0.0, 0.25, 1.0])  # so that there are ties
logits = st.one_of(few, st.floats(-50, 50, width=32))
rows = st.integers(0, 12).flatmap(
    lambda n: st.tuples(*(st.lists(kind, min_size=n, max_size=n) for kind in (logits, logits, st.booleans())))
)


@some
@given(row=rows, most=st.integers(1, 15), n=st.integers(1, 40))
@example(row=([0.0] * 9, [0.0] * 9, [True] * 9), most=3, n=5)
@example(row=([2.0**26, 0.0], [1.0, 2.0], [True, True]), most=2, n=1)  # no float32 tells the two ends apart
def test_best_spans(row: tuple[list[float], list[float], list[bool]], most: int, n: int) -> None:
    starts, ends, allowed = row
    everything = [
        Candidate(start, end, starts[start] + ends[end])
        for start in range(len(starts))
        for end in range(start, min(start + most, len(ends)))
        if allowed[start] and allowed[end]
    ]
    expected = sorted(everything, key=lambda one: (-one.score, one.start, one.end))[:n]
    tensors = (torch.tensor(starts), torch.tensor(ends), torch.tensor(allowed, dtype=torch.bool))
    assert find_best_spans(*tensors, most, n) == expected


def test_long_contexts_take_memory_of_a_band() -> None:
    """A matrix of all starts and ends would take 80 GB."""
    starts, ends = torch.zeros(100_000), torch.zeros(100_000)
    starts[70_000], ends[70_004], ends[70_010] = 3, 2, 5
    best = find_best_spans(starts, ends, torch.ones(100_000, dtype=torch.bool), 10, 2)
    assert best == [Candidate(70_000, 70_004, 5.0), Candidate(70_001, 70_010, 5.0)]
    assert find_best_spans(starts, ends, torch.ones(100_000, dtype=torch.bool), 11, 1) == [
        Candidate(70_000, 70_010, 8.0)
    ]


candidates = st.lists(st.builds(Candidate, st.integers(0, 3), st.integers(3, 5), few))


@some
@given(spans=candidates, n=st.integers(1, 8))
def test_merged(spans: list[Candidate], n: int) -> None:
    places = {(one.start, one.end) for one in spans}
    best = [Candidate(*place, max(one.score for one in spans if (one.start, one.end) == place)) for place in places]
    assert merge_candidates(spans, n) == sorted(best, key=lambda one: (-one.score, one.start, one.end))[:n]


@some
@given(length=st.integers(0, 60), room=st.integers(1, 12), stride=st.integers(0, 11))
def test_windows_are_those_of_the_tokenizers_library(length: int, room: int, stride: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    if length > room and stride >= room:
        with pytest.raises(LlamaError, match=rf"windows of {room} tokens .* doc_stride {stride}.* below {room}"):
            list(split_windows(length, room, stride))
        return
    library = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Split("a", "isolated")  # type: ignore[assignment]
    library.enable_truncation(room, stride=min(stride, room - 1))
    encoding = library.encode("a" * length)
    expected = [(one.offsets[0][0], one.offsets[-1][1]) for one in (encoding, *encoding.overflowing) if one.ids]
    assert list(split_windows(length, room, stride)) == expected


def test_no_negative_overlap() -> None:
    with pytest.raises(LlamaError, match="doc_stride -1"):
        list(split_windows(5, 2, -1))


# Tags

TEXT = "Anna  Lee met Bob in New York."
OFFSETS = [(0, 0), (0, 4), (4, 6), (6, 9), (9, 13), (13, 17), (17, 20), (20, 24), (24, 29), (29, 30)]


def group(*labels: str) -> list[tuple[str, int, int, str]]:
    spans = collect_tagged_spans(["B-NO", *labels], [0.5] * len(OFFSETS), OFFSETS, TEXT)
    return [(span.text, span.start, span.end, span.label) for span in spans]


def test_tags() -> None:
    assert group("B-PER", "I-PER", "I-PER", "O", "B-PER", "O", "B-LOC", "I-LOC", "O") == [
        ("Anna  Lee", 0, 9, "PER"),
        ("Bob", 14, 17, "PER"),
        ("New York", 21, 29, "LOC"),
    ]
    # what begins anew, what continues another, what only continues, what is white space
    assert group("B-PER", "B-PER", "B-PER", "O", "I-PER", "I-LOC", "O", "I-LOC", "B-LOC") == [
        ("Anna", 0, 4, "PER"),
        ("Lee", 6, 9, "PER"),
        ("Bob", 14, 17, "PER"),
        ("in", 18, 20, "LOC"),
        ("York", 25, 29, "LOC"),
        (".", 29, 30, "LOC"),
    ]
    assert group("PER", "PER", "PER", "O", "PER", "LOC", "B-LOC", "LOC", "I-LOC") == [
        ("Anna  Lee", 0, 9, "PER"),
        ("Bob", 14, 17, "PER"),
        ("in", 18, 20, "LOC"),
        ("New York.", 21, 30, "LOC"),
    ]


def test_a_score_is_the_mean_over_tokens() -> None:
    spans = collect_tagged_spans(
        ["O", "X", "I-X", "B-X"], [0.1, 0.25, 0.5, 0.75], [(0, 1), (1, 2), (2, 2), (2, 3)], "abc"
    )
    assert spans == [Span("b", 1, 2, "X", 0.25), Span("c", 2, 3, "X", 0.75)]
    (span,) = collect_tagged_spans(["X", "X", "I-X"], [0.1, 0.25, 0.5], [(0, 1), (1, 2), (2, 3)], "abc")
    assert span == Span("abc", 0, 3, "X", pytest.approx(0.85 / 3))


def test_parts_of_one_character() -> None:
    """A character of several tokens belongs to the first span that has one of them."""
    offsets = [(0, 1), (0, 1), (0, 1), (1, 2)]
    assert collect_tagged_spans(["B-X", "I-X", "I-X", "I-X"], [1.0] * 4, offsets, "中a") == [
        Span("中a", 0, 2, "X", 1.0)
    ]
    assert collect_tagged_spans(["O", "B-X", "B-Y", "I-Y"], [1.0] * 4, offsets, "中a") == [
        Span("中", 0, 1, "X", 1.0),
        Span("a", 1, 2, "Y", 1.0),
    ]


tags = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])


@some
@given(tokens=st.lists(st.tuples(tags, st.sampled_from(["a", " b", "  ", "\n", "é "]), st.floats(0, 1))))
def test_tags_as_transformers_has_them(tokens: list[tuple[str, str, float]]) -> None:
    """The pipeline groups by "simple"; every token is a character."""
    from transformers.pipelines.token_classification import TokenClassificationPipeline

    text = "".join(piece for _, piece, _ in tokens)
    ends = [sum(len(piece) for _, piece, _ in tokens[: i + 1]) for i in range(len(tokens))]
    offsets = [(end - len(piece), end) for (_, piece, _), end in zip(tokens, ends, strict=True)]
    entities = [
        {"entity": tag, "score": score, "word": piece, "start": start, "end": end, "index": i}
        for i, ((tag, piece, score), (start, end)) in enumerate(zip(tokens, offsets, strict=True))
    ]
    pipeline = TokenClassificationPipeline.__new__(TokenClassificationPipeline)
    pipeline.tokenizer = type("Joining", (), {"convert_tokens_to_string": staticmethod("".join)})()
    theirs = [group for group in pipeline.group_entities(entities) if group["entity_group"] != "O"]
    expected = [(*strip_range(text, group["start"], group["end"]), group["entity_group"]) for group in theirs]
    spans = collect_tagged_spans([tag for tag, _, _ in tokens], [score for _, _, score in tokens], offsets, text)
    assert [(span.start, span.end, span.label) for span in spans] == [one for one in expected if one[0] < one[1]]
    kept = [group for group, (start, end, _) in zip(theirs, expected, strict=True) if start < end]
    assert [span.score for span in spans] == [pytest.approx(float(group["score"])) for group in kept]
    assert all(span.text == text[span.start : span.end] == span.text.strip() != "" for span in spans)


@some
@given(text=st.text("a \n\u3000é"), start=st.integers(0, 6), size=st.integers(0, 6))
def test_stripped(text: str, start: int, size: int) -> None:
    start = min(start, len(text))
    end = min(start + size, len(text))
    begin, stop = strip_range(text, start, end)
    assert text[begin:stop] == text[start:end].strip() and start <= begin <= stop <= end


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I live.", ["I", " ", "live", "."]),
        ("Má\u0301laga's", ["Má\u0301laga", "'", "s"]),
        ("北京 ok", ["北", "京", " ", "ok"]),
        ("안녕! ", ["안녕", "!", " "]),
        ("नमस्ते 2026", ["नमस्ते", " ", "2026"]),
        ("\u0301a", ["\u0301", "a"]),
        ("สวย", ["ส", "ว", "ย"]),
        ("", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    numbers = number_words(text)
    assert [
        "".join(c for c, n in zip(text, numbers, strict=True) if n == i) for i in range(len(words))
    ] == words and len(set(numbers)) == len(words)


def test_a_word_is_what_its_last_token_says() -> None:
    text = "Was hington Kenya"
    offsets = [(0, 0), (0, 1), (1, 3), (3, 8), (8, 11), (11, 17)]
    labels = ["B-X", "B-PLACE", "O", "B-PLACE", "I-PLACE", "B-PLACE"]
    agreed, sure = align_labels_to_words(labels, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], offsets, text)
    assert agreed == ["B-X", "O", "O", "B-PLACE", "I-PLACE", "B-PLACE"]
    assert sure == [0.1, 0.3, 0.3, 0.5, 0.5, 0.6]
    spans = collect_tagged_spans(agreed, sure, offsets, text)
    assert [(span.text, span.label, span.score) for span in spans] == [
        ("hington", "PLACE", 0.5),
        ("Kenya", "PLACE", 0.6),
    ]
    assert align_labels_to_words(["PLACE", "O"], [0.5, 0.6], [(0, 1), (1, 2)], "ab") == (["O", "O"], [0.6, 0.6])
    assert align_labels_to_words(["O", "PLACE"], [0.5, 0.6], [(0, 1), (1, 2)], "ab") == (["PLACE", "PLACE"], [0.6, 0.6])


@some
@given(text=st.text(max_size=30), data=st.data())
def test_words_are_never_cut(text: str, data: st.DataObject) -> None:
    """With a token for each character, and any labels, no span begins or ends inside of a word."""
    labels = data.draw(
        st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), min_size=len(text), max_size=len(text))
    )
    offsets = [(i, i + 1) for i in range(len(text))]
    agreed, sure = align_labels_to_words(labels, [0.5] * len(text), offsets, text)
    numbers = number_words(text)
    for span in collect_tagged_spans(agreed, sure, offsets, text):
        assert span.start == 0 or numbers[span.start] != numbers[span.start - 1]
        assert span.end == len(text) or numbers[span.end] != numbers[span.end - 1]
