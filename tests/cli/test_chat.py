"""A chat through a pipe: each command, a full context window, texts of several lines, good and bad files."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import ARGS, run_program, write_checkpoint

from llama import Llama
from llama.cli import chat as chat_room
from llama.cli.chat import talk
from llama.cli.keyboard import Entry, parse_entry
from llama.engine.sequence import Step
from llama.session import Session

Talked = tuple[str, str, list[str]]  # standard output, standard error, prompts


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("chat") / "ckpt", ARGS, endless=True))


@pytest.fixture(scope="module")
def llama(directory: str) -> Llama:
    return Llama.build(directory, max_seq_len=120, max_batch_size=1, device="cpu", dtype="float32")


@pytest.fixture
def chat(llama: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Talked]:
    """Chat with these lines as the input."""

    def run(*lines: str, system: str | None = None, **sampling: Any) -> Talked:
        prompts = []

        class Watched(Session):
            def stream(self, prompt: list[int], **options: Any) -> Iterator[Step]:  # type: ignore[override]
                prompts.append(llama.tokenizer.decode(prompt))
                return super().stream(prompt, **options)

        monkeypatch.setattr(chat_room, "Session", Watched)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode())))
        talk(llama, system, {"temperature": 0, "max_gen_len": 4, **sampling})
        shown = capsys.readouterr()
        return shown.out, shown.err, prompts

    return run


def answers(llama: Llama, *asked: str, system: str | None = None, **options: Any) -> list[str]:
    dialog: list[Any] = [{"role": "system", "content": system}] if system else []
    for text in asked:
        dialog.append({"role": "user", "content": text})
        dialog.append(
            llama.chat_completion([dialog], **{"temperature": 0, "max_gen_len": 4, **options})[0]["generation"]
        )
    return [one["content"] for one in dialog if one["role"] == "assistant"]


def said(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def asked_in(prompt: str) -> list[str]:
    """The user's messages in a prompt."""
    return [part.split("<|eot_id|>")[0] for part in prompt.split("user<|end_header_id|>\n\n")[1:]]


def tokens_in(llama: Llama, prompt: str) -> int:
    return len(llama.tokenizer.encode(prompt, bos=False, eos=False, allowed_special="all"))


def test_the_answers_and_nothing_else_are_printed(llama: Llama, chat: Callable[..., Talked]) -> None:
    out, err, _ = chat("hello", "", "you", "/reset", "hello", "/quit", "never read")
    assert out == said([*answers(llama, "hello", "you"), *answers(llama, "hello")])
    assert err == "(the dialog is forgotten)\n"


def test_the_system_message_comes_and_goes(llama: Llama, chat: Callable[..., Talked]) -> None:
    out, err, prompts = chat("a", "/reset", "/system be \x1b[1m brief", "a", "/system", "/reset", "a", system="rhyme")
    assert "rhyme" in prompts[0] and "brief" in prompts[1] and "system" not in prompts[2]
    assert out.startswith(said(answers(llama, "a", system="rhyme")))
    assert "(system message: be \ufffd[1m brief)\n" in err and "(no system message)\n" in err


def test_undo_and_retry(llama: Llama, chat: Callable[..., Talked]) -> None:
    out, err, prompts = chat("/undo", "/retry", "one", "two", "/undo", "two", "/retry")
    one, two = answers(llama, "one", "two")
    assert out == said([one, two, two, two])
    assert err.count("(error: nothing was asked yet)\n") == 2
    assert "(forgotten; the dialog has 2 messages)\n" in err and "always the same" in err
    assert prompts[1] == prompts[2] == prompts[3]


def test_retry_draws_anew(chat: Callable[..., Talked]) -> None:
    out, _, prompts = chat("one", "/retry", "/retry", temperature=1.0, max_gen_len=20, stop=["\n"])
    assert len(set(out.split("\n"))) == 3 + 1  # and what follows the last
    assert len(set(prompts)) == 1


def test_sampling_options_are_taken(llama: Llama, chat: Callable[..., Talked]) -> None:
    options = {"temperature": 0.9, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "stop": ["e", "a"], "seed": 5}
    out, _, _ = chat("one", "two", **options)
    assert out == said(answers(llama, "one", "two", **options))


def test_stats_are_told_of_each_answer_and_no_longer(llama: Llama, chat: Callable[..., Talked]) -> None:
    _, err, prompts = chat("one", "/stats", "one", "two", "/stats", "three")
    told = [line for line in err.splitlines() if "prefilled" in line]
    assert len(told) == 2 and all("tokens/s, first token after 0." in line and len(line) < 80 for line in told)
    prefilled, reused = (int(told[1].split()[i]) for i in (-4, -2))
    assert prefilled + reused == tokens_in(llama, prompts[2])
    assert reused >= tokens_in(llama, prompts[1])


def test_a_further_turn_prefills_what_is_new(llama: Llama, chat: Callable[..., Talked]) -> None:
    """The answer is one token, and the last token of an answer was never fed to the model: it is new, too."""
    _, err, prompts = chat("/stats", "one", "two", max_gen_len=1)
    first, second = (tokens_in(llama, prompt) for prompt in prompts)
    assert f" {second - first} prefilled, {first} reused)" in err.splitlines()[-1]


# --- the window ------------------------------------------------------------------------------------------------------


def test_a_full_window_drops_the_oldest_turns_and_says_so(llama: Llama, chat: Callable[..., Talked]) -> None:
    texts = [f"{i} {'x' * 10}" for i in range(7)]
    _, err, prompts = chat(*texts, system="be nice")
    assert len(prompts) == 7
    assert all("be nice" in prompt for prompt in prompts)
    for i, prompt in enumerate(prompts):
        seen = asked_in(prompt)
        assert seen == texts[i + 1 - len(seen) : i + 1], "the newest, in order"
        assert tokens_in(llama, prompt) <= 120 - 4
    assert len(asked_in(prompts[1])) == 2 > 1 <= len(asked_in(prompts[6]))
    assert "(the window of 120 tokens is full: the oldest turn is no longer read)\n" in err
    assert "error" not in err


def test_what_is_no_longer_read_is_still_saved(chat: Callable[..., Talked], tmp_path: Path) -> None:
    texts = [f"{i} {'x' * 20}" for i in range(6)]
    _, err, prompts = chat(*texts, f"/save {tmp_path}/d", *["/undo"] * 7, "y")
    saved = json.loads((tmp_path / "d").read_text())
    assert [one["content"] for one in saved if one["role"] == "user"] == texts
    assert asked_in(prompts[-1]) == ["y"]
    assert err.count("(forgotten;") == 6 and err.count("(error: nothing was asked yet)") == 1


def test_a_message_that_is_too_long_alone_is_told_and_nothing_is_lost(chat: Callable[..., Talked]) -> None:
    _, err, prompts = chat("one", "x" * 130, "two")
    assert "(error: the text has 1" in err and "leaves no room for an answer within 120: shorten it" in err
    assert asked_in(prompts[-1]) == ["one", "two"]
    assert "full" not in err


def test_a_message_that_leaves_little_room_gets_what_there_is(llama: Llama, chat: Callable[..., Talked]) -> None:
    out, err, prompts = chat("one", "x" * 90, max_gen_len=None)
    assert asked_in(prompts[-1]) == ["x" * 90]
    room = 120 - tokens_in(llama, prompts[-1])
    assert 0 < room < 20
    assert out.endswith(said(answers(llama, "x" * 90, max_gen_len=room)))
    assert err.endswith("(the window of 120 tokens is full: the answer ends here)\n")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_dialog_goes_on_where_it_was(
    llama: Llama, chat: Callable[..., Talked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, err, _ = chat("/save x", "é漢字🙂", "/save ~/a b.json", "/save ~/a b.json", system="rhyme")
    assert "(error: there is nothing to save yet)" not in err, "a system message is something"
    Path("x").unlink()
    (answer,) = answers(llama, "é漢字🙂", system="rhyme")
    saved = json.loads((tmp_path / "a b.json").read_text(encoding="utf-8"))
    assert saved == [
        {"role": "system", "content": "rhyme"},
        {"role": "user", "content": "é漢字🙂"},
        {"role": "assistant", "content": answer},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a b.json"]
    out, err, prompts = chat("before", "/load ~/a b.json", "two", system="forgotten")
    assert "(loaded 3 messages from ~/a b.json)" in err
    assert out.endswith(said(answers(llama, "é漢字🙂", "two", system="rhyme")[1:]))
    assert "forgotten" not in prompts[-1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read (No such file or directory)"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "holds {}: expected a JSON list of"),
        ("[]", "holds []: expected a JSON list of"),
        ('["hi"]', "message 1 of 1 is 'hi': expected"),
        ('[{"role": "user", "content": 5}]', "message 1 of 1 is {'role': 'user', 'content': 5}: expected"),
        ('[{"role": ["user"], "content": ""}]', "message 1 of 1 has the role ['user']: expected system, user, assis"),
        ('[{"role": "user", "content": ""}, {"role": "system", "content": ""}]', "message 2 of 2 is a system message"),
    ],
)
def test_a_bad_file_is_told_and_changes_nothing(
    chat: Callable[..., Talked], tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "d.json"
    if content is not None:
        path.write_text(content)
    _, err, prompts = chat("one", f"/load {path}", "two")
    assert f"(error: {path}" in err and says in err
    assert len(err.splitlines()) == 1
    assert asked_in(prompts[-1]) == ["one", "two"]


def test_files_that_hold_something_else_are_not_written_over(chat: Callable[..., Talked], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "empty").touch()
    names = [tmp_path / "notes", tmp_path, tmp_path / "no/where", "/dev/null", tmp_path / "empty", "nul\0"]
    _, err, _ = chat("one", *(f"/save {name}" for name in names), "/load /dev/zero", "/save", "/load")
    told = err.splitlines()
    assert all("exists and is no dialog: give another name" in told[i] for i in (0, 1, 3))
    assert "can't be written (No such file or directory)" in told[2]
    assert told[4] == f"(saved 2 messages to {tmp_path}/empty)"
    assert "can't be written (embedded null byte)" in told[5]
    assert "/dev/zero is no file" in told[6]
    assert told[7:] == [f"(error: /{name} FILE: the name of the file is missing)" for name in ("save", "load")]
    assert (tmp_path / "notes").read_text() == "mine" and not Path("/dev/null").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "empty"}


# --- what is typed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "entry"),
    [
        ("  hello ", Entry("hello")),
        ("", Entry("")),
        ("a\\", None),
        ("a\\\nb", Entry("a\nb")),
        ("/system a\\\nb", Entry("/system a\nb")),
        ('"""', None),
        ('"""a', None),
        ('"""a\nb\\\n', None),
        ('"""\n  a\\\n  /b\n"""', Entry("a\\\n  /b", literal=True)),
        ('"""/etc"""', Entry("/etc", literal=True)),
        ('""""""', Entry("", literal=True)),
        ("pasted\nlines", Entry("pasted\nlines")),
    ],
)
def test_where_an_entry_ends(typed: str, entry: Entry | None) -> None:
    assert parse_entry(typed) == entry


def test_texts_of_several_lines(chat: Callable[..., Talked]) -> None:
    _, err, prompts = chat("a\\", "b", '"""', "/quit", "", "c", '"""', '"""d', "e")
    assert asked_in(prompts[-1]) == ["a\nb", "/quit\n\nc", "d\ne"], "the end of the input ends a text too"
    assert err == ""


def test_commands_that_are_none(chat: Callable[..., Talked]) -> None:
    out, err, _ = chat("/what", "/reset my router", "/", "/quit now", "/help")
    assert out == ""
    assert err.startswith(
        "(error: unknown command /what; /help lists all)\n(error: /reset takes nothing after it)\n"
        "(error: unknown command /; /help lists all)\n(error: /quit takes nothing after it)\n"
    )
    for name in ("/help", "/system", "/retry", "/undo", "/reset", "/save", "/load", "/stats", "/quit"):
        assert err.count(f"\n  {name} ") == 1
    assert max(map(len, err.splitlines())) < 80


@pytest.mark.parametrize("option", ["--top_k 0", "--min_p 2", "--repetition_penalty 0", "--stop="])
@pytest.mark.slow
def test_bad_sampling_is_refused_before_the_model_loads(option: str) -> None:
    done = run_program("-m", "llama", "chat", "--ckpt_dir", "/nowhere", *option.split(), input="hi\n")
    name = option.split()[0].strip("-=")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {name} is ") and "expected" in done.stderr


@pytest.mark.slow
def test_ranks_talk_alike_and_tell_errors_once(directory: str, tmp_path: Path) -> None:
    """Only rank 0 reads files. If another rank read them too, it could get another dialog, and wait for ever."""
    lines = f"hello\n/load {tmp_path}\n/save {tmp_path}/d\n/reset\n/load {tmp_path}/d\n/retry\n\\\nyou\n"
    options = ["--ckpt_dir", directory, "--device", "cpu", "--dtype", "float32", "--max_gen_len", "4"]
    command = ["-m", "llama", "chat", *options, "--temperature", "0", "--stop", "zz", "--stop", "yy"]
    alone, two = run_program(*command, input=lines), run_program(*command, ranks=2, input=lines)
    assert alone.returncode == two.returncode == 0, two.stderr
    assert alone.stdout == two.stdout
    assert two.stderr.count("is no file: expected a JSON list") == 1
    assert two.stderr.count("(loaded 2 messages") == 1
