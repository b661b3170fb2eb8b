"""The generated records are right: spans lie on their words, and what is held out never occurs in training.

The oracles are the tables themselves, regular expressions and the demo model's vocabulary.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tiny import ROOT, run_program

from demo.facts import bank
from demo.tasks import EVALUATED, KINDS, make_records
from demo.templates import EVERY, PARTS, word_lists, words
from demo.topics import TOPICS
from llama import LlamaError, Tokenizer

DATA = ROOT / "demo" / "data"
SHEETS = {"topics": "topic", "places": "place", "questions": "question"}
ASIDES = ("before", "after", "someone", "tail")  # pieces of sentences, none of them put aside


@pytest.fixture(scope="module", params=KINDS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[list[dict], list[dict]]]:
    return {name: make_records(name) for name in KINDS}


def text_of(record: dict) -> str:
    return "\n".join(record[field] for field in ("question", "context", "text") if field in record)


def banks(task: str) -> list[list[str]]:
    """The templates of a task in groups of the same purpose."""
    head = ""
    groups: list[list[str]] = []
    for line in (DATA / f"{SHEETS[task]}_sentences.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            head = line[2:]
            groups += [] if head in ASIDES or task == "questions" else [[]]
        elif head not in ASIDES:
            groups = [*groups, line.split(" / ")] if task == "questions" else [*groups[:-1], [*groups[-1], line]]
    return groups


def pattern(template: str) -> re.Pattern:
    """A pattern that matches the template with any words in its slots."""
    parts = [re.escape(part.rstrip(".?")) for part in re.split(r"\{\w+\}", template)]
    return re.compile("[^.?!]+".join(parts), re.IGNORECASE)


def slots_of(task: str) -> set[str]:
    """The word lists that the task's sentences draw from."""
    text = (DATA / f"{SHEETS[task]}_sentences.txt").read_text(encoding="utf-8")
    more = {"topics": set(), "places": {"woman", "man"}, "questions": {"woman", "man", "thing", "town"}}[task]
    return more | set(re.findall(r"\{(\w+)\}", text)) & set(word_lists())


def test_counts(made: dict, task: str) -> None:
    trained, held = made[task]
    assert (len(trained), len(held)) == (KINDS[task].trained, EVALUATED)


def test_nothing_occurs_twice_and_nothing_held_out_in_training(made: dict, task: str) -> None:
    trained, held = ([record.get("context", record.get("text")) for record in part] for part in made[task])
    assert len(set(trained)) == len(trained) and len(set(held)) == len(held)
    assert not set(trained) & set(held)


def test_held_out_templates_are_absent(made: dict, task: str) -> None:
    """Held-out templates never occur in training, all others do; parts with new templates use only those."""
    trained, held = ("\n".join(map(text_of, part)) for part in made[task])
    for wordings in banks(task):
        assert len(wordings) >= EVERY
        for i, template in enumerate(wordings):
            aside = i % EVERY == EVERY - 1
            assert bool(pattern(template).search(trained)) != aside, template
            assert not aside or pattern(template).search(held), template


def test_held_out_words_are_absent(made: dict, task: str) -> None:
    trained, held = ("\n".join(map(text_of, part)) for part in made[task])
    for slot in slots_of(task):
        aside = word_lists()[slot][EVERY - 1 :: EVERY]
        assert aside and words(True)[slot] == aside and not set(aside) & set(words(False)[slot])
        matches = [word for word in aside if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", trained, re.IGNORECASE)]
        assert not matches, slot
        assert any(word in held for word in aside), slot


def test_all_four_parts_are_held_out(made: dict, task: str) -> None:
    """Records take the parts in turn: those of new words have held-out words, the others have none."""
    aside = [word for slot in slots_of(task) for word in words(True)[slot]]
    aside_pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in aside), re.IGNORECASE)
    unseen = [pattern(template) for wordings in banks(task) for template in wordings[EVERY - 1 :: EVERY]]
    for i, record in enumerate(made[task][1]):
        part, text = PARTS[i % 4], text_of(record)
        assert bool(aside_pattern.search(text)) == part.new_words, text
        assert any(p.search(text) for p in unseen) == part.new_templates, text


def test_records_are_short_and_survive_json(made: dict, task: str) -> None:
    tokenizer = Tokenizer(str(ROOT / "demo" / "model" / "tokenizer.model"))
    for record in made[task][0] + made[task][1]:
        assert json.loads(json.dumps(record, ensure_ascii=False)) == record
        assert len(tokenizer.encode(text_of(record), bos=True, eos=True)) <= 96


def test_topics_are_about_as_frequent(made: dict) -> None:
    for records in made["topics"]:
        counts = Counter(record["label"] for record in records)
        assert set(counts) == set(TOPICS)
        assert all(0.06 < count / len(records) < 0.2 for count in counts.values())
        assert all(set(record) == {"text", "label"} for record in records)


def test_one_word_does_not_tell_the_topic(made: dict) -> None:
    """Words of one topic also occur in sentences of others."""
    for word in ("concert", "soup", "doctor", "piano", "train", "rain", "match"):
        assert len({r["label"] for r in made["topics"][0] if word in r["text"].casefold()}) >= 4, word


def test_spans_lie_on_places_and_languages(made: dict) -> None:
    known = {
        "PLACE": {word.removeprefix("the ") for word in word_lists()["city"] + word_lists()["country"]},
        "LANGUAGE": set(word_lists()["language"]),
    }
    made_up = f"(?:{'|'.join(bank('syllables'))}){{2}}(?:{'|'.join(bank('word ends'))})?(?:ia|ish)?"
    for records in made["places"]:
        for record in records:
            end = 0
            for span in record["spans"]:
                assert end <= span["start"] < span["end"]
                end = span["end"]
                word = record["text"][span["start"] : end]
                assert word in known[span["label"]] or re.fullmatch(made_up, word.casefold()), word
        counts = Counter(len(record["spans"]) for record in records)
        assert all(counts[number] > 0.1 * len(records) for number in range(3)) and counts[3]
        texts = [(record["text"], record["spans"]) for record in records]
        assert sum(not text.isascii() for text, _ in texts) > 0.3 * len(records)
        assert any(not text[: spans[0]["start"]].isascii() for text, spans in texts if spans)


def test_the_same_word_is_marked_or_not(made: dict) -> None:
    def words_of(marked: bool) -> set[str]:
        marked_words = set()
        for record in made["places"][0]:
            text = record["text"]
            spans = {(span["start"], span["end"]) for span in record["spans"]}
            marked_words |= {m[0] for m in re.finditer(r"\w+", text) if (m.span() in spans) == marked}
        return marked_words

    both = words_of(True) & words_of(False)
    assert {"French", "German", "Sofia", "Jordan", "Sydney"} <= both


def test_answers_stand_where_they_say(made: dict) -> None:
    every = {word for ws in word_lists().values() for word in ws}
    for records in made["questions"]:
        for record in records:
            assert 1 <= len(re.findall(r"\.", record["context"])) <= 4
            for answer in record["answers"]:
                assert answer["text"] in every
                assert record["context"][answer["start"] : answer["start"] + len(answer["text"])] == answer["text"]
        unanswered = sum(not record["answers"] for record in records) / len(records)
        assert 0.15 < unanswered < 0.25


def facts_in(context: str) -> set[tuple[str, int, str]]:
    """(subject, relation, answer) of a text, found by matching its sentences with the templates."""
    facts = set()
    for text in re.findall(r"[^.]+", context):
        for number, templates in enumerate(banks("questions")[0::2]):
            for template in templates:
                tail = re.escape(template.removesuffix(".").removeprefix("{x} "))
                slot = re.search(r"\\\{\w+\\\}", tail)
                assert slot
                tail = tail.replace(slot[0], r"(?P<answer>[\w ]+)")
                match = re.fullmatch(rf"(?P<subject>(?:The )?\w+) {tail}", text.strip())
                if match and match["answer"] in word_lists().get(slot[0].strip("\\{}"), match["answer"]):
                    facts.add((match["subject"].casefold(), number, match["answer"]))
    return facts


def test_a_reader_finds_the_same_answers(made: dict) -> None:
    """The answer is the only one that the context states; for a question without an answer it states none."""
    questions = banks("questions")[1::2]
    for record in made["questions"][0][:800] + made["questions"][1]:
        answers = set()
        for number, wordings in enumerate(questions):
            for wording in wordings:
                match = re.fullmatch(re.escape(wording).replace(r"\{x\}", r"(.+)"), record["question"])
                if match:
                    said = facts_in(record["context"])
                    answers |= {a for s, n, a in said if (s, n) == (match[1].casefold(), number)}
        assert answers == {answer["text"] for answer in record["answers"]}, record


def test_the_seed_decides(tmp_path: Path, made: dict, task: str) -> None:
    """The same bytes in another process, whose string hashes differ; other records for another seed."""
    done = run_program("-m", "demo.tasks", task, "--output", str(tmp_path / "new" / "directory"))
    assert done.returncode == 0, done.stderr
    for name, records in zip(("train", "eval"), made[task], strict=True):
        lines = (tmp_path / "new" / "directory" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        assert lines.pop() == "" and [json.loads(line) for line in lines] == records
        assert lines == [json.dumps(record, ensure_ascii=False) for record in records]
    assert make_records(task, seed=2)[0] != made[task][0]


@pytest.mark.parametrize("arguments", [("poems",), ("topics", -1), ("topics", True), ("topics", 1.5)])
def test_mistakes_are_told(arguments: tuple) -> None:
    with pytest.raises(LlamaError, match=r"topics, places, questions|whole number from 0 on"):
        make_records(*arguments)


def test_nothing_is_written_after_a_mistake(tmp_path: Path) -> None:
    done = run_program("-m", "demo.tasks", "topics", "--output", str(tmp_path / "there"), "--seed", "x")
    assert done.returncode == 1 and done.stderr.startswith("error: seed is str 'x'")
    assert not (tmp_path / "there").exists()
    (tmp_path / "file").write_text("")
    done = run_program("-m", "demo.tasks", "topics", "--output", str(tmp_path / "file"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
