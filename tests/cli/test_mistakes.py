"""Mistakes on the command line: one line says what was probably meant. And what is shown while a program starts."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from terminal import Terminal
from tiny import run_program, write_checkpoint

from llama import Llama, LlamaError
from llama._util.device import choose_dtype
from llama._util.files import unreadable_error
from llama._util.resumable import check_same_job
from llama.cli.chat import Chat, talk
from llama.cli.commands import COMMANDS, parse
from llama.cli.mistakes import SCREENFUL, format_error
from llama.cli.program import errors_in_one_line


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What is printed for a command line, in words, that can't be parsed."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["llama", *words])
        with pytest.raises(SystemExit) as ended:
            parse()
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        usage, message = err.splitlines()
        assert out == "" and usage.startswith("usage: python -m llama") and message.startswith("error: ")
        return message.removeprefix("error: ")

    return run


def test_a_command_that_is_misspelt(mistake) -> None:
    for wrong, right in {"caht": "chat", "compelte": "complete", "Chat": "chat", "inpsect": "inspect"}.items():
        assert mistake(wrong) == f"unknown command {wrong}; did you mean {right}?"
    known = f"known are {', '.join(COMMANDS)}"
    assert mistake("sing") == f"unknown command sing; {known}"
    assert mistake() == f"no command was given; {known}"
    assert mistake("--top_k", "5", "chat").startswith(
        "found --top_k in the place of a command: write python -m llama chat --top_k"
    )
    assert mistake("The sea is").endswith('write python -m llama complete "The sea is"')


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (("chat", "--temprature", "0.5"), "--temperature"),
        (("chat", "--temprature=0.5"), "--temperature"),
        (("chat", "--max-seq-len", "5"), "--max_seq_len"),
        (("complete", "a", "--TOP_P", "0.5"), "--top_p"),
        (("complete", "a", "-top_p", "0.5"), "--top_p"),
        (("convert", "a", "b", "--too", "hf"), "--to"),
        (("inspect", "a", "--jsn"), "--json"),
        (("finetune", "--tsk", "tag"), "--task"),
        (("bench", "--batchs", "4"), "--batch"),
    ],
)
def test_an_option_that_is_misspelt(mistake, words: tuple[str, ...], right: str) -> None:
    wrong = next(word for word in words if word.startswith("-")).partition("=")[0]
    assert mistake(*words) == f"unknown option {wrong}; did you mean {right}?"


def test_an_option_that_is_like_none(mistake) -> None:
    assert mistake("chat", "--loud") == "unknown option --loud; python -m llama chat --help lists all"
    assert mistake("chat", "-x", "1") == "unknown option -x; python -m llama chat --help lists all"
    assert mistake("chat", "\u2014top_p", "1") == "\u2014top_p begins with another character than -: write --top_p"
    assert mistake("chat", "\u2013-top_p=1") == "\u2013-top_p begins with another character than -: write --top_p"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("complete The meaning of life is", "The meaning of life is"),
        ("complete the the a the", "the the a the"),
        ("complete --top_p 0.5 The meaning --seed 3", "The meaning"),
        ("complete --stop The end here", "here"),
        ("chat --system You are a pirate --seed 3", "You are a pirate"),
        ("inspect /home/My Models/x", "/home/My Models/x"),
        ("convert My Models out --to hf", "Models out"),
    ],
)
def test_a_text_without_quotes(mistake, words: str, text: str) -> None:
    message = mistake(*words.split())
    assert f'put a text of several words in quotes: "{text}"' in message or (text == "here" and "quotes" in message)


def test_a_text_for_a_command_that_takes_none(mistake) -> None:
    assert mistake("chat", "hello", "you") == "python -m llama chat takes no 'hello': expected options alone"
    assert mistake("bench", "--compile", "x") == "python -m llama bench takes no 'x': expected options alone"


def test_texts_that_begin_like_options_are_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, text in ((["--", "-x"], "-x"), (["-5"], "-5"), (["\u2014 so"], "\u2014 so"), (["- a"], "- a")):
        monkeypatch.setattr(sys, "argv", ["llama", "complete", *words])
        assert parse().text == text


def test_a_message_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    message = f"{'x' * 100_000} is too much: take less"
    assert len(format_error(message)) < SCREENFUL + 20
    assert format_error(message).endswith(" is too much: take less")
    with pytest.raises(SystemExit), errors_in_one_line():
        raise LlamaError(message)
    assert len(capsys.readouterr().err) < SCREENFUL + 20
    assert format_error("short") == "error: short"


def test_giant_values_are_shortened_in_messages(tmp_path: Path) -> None:
    directory, giant = write_checkpoint(tmp_path / "ckpt"), "x" * 10_000
    for options in (
        *({name: giant} for name in ("dtype", "device", "quantization", "max_seq_len", "seed")),
        {"max_batch_size": 10**4000},
        {"max_seq_len": 10**5000},
        {"ckpt_dir": [giant]},
    ):
        with pytest.raises(LlamaError) as caught:
            Llama.build(**{"ckpt_dir": directory, "device": "cpu", "dtype": "float32", **options})  # type: ignore
        assert len(str(caught.value)) < 300, options.keys()


FEW_BITS = ["fp8", "float8_e4m3fn", "F8_E4M3", "int8", "INT4", "q4_0", "Q8_0", "nf4", "8bit", "4-bit", torch.int8]


@pytest.mark.parametrize("dtype", [*FEW_BITS, torch.float8_e4m3fn])
def test_a_dtype_of_few_bits(dtype: str | torch.dtype) -> None:
    with pytest.raises(LlamaError, match=r"--quantization int8 or int4 \(quantization='int8'\)$"):
        choose_dtype(dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "right"),
    [("bflot16", "bfloat16"), ("Float32", "float32"), ("BF16", "bf16"), ("float64", None), ("half", None)],
)
def test_a_dtype_that_is_misspelt(dtype: str, right: str | None) -> None:
    with pytest.raises(LlamaError) as caught:
        choose_dtype(dtype, torch.device("cpu"))
    end = f"; did you mean {right}?" if right else "expected bfloat16, float16 or float32"
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize(
    "error", [OSError("No such device (os error 19)"), OSError(), OSError(5, "Input/output error")]
)
def test_an_error_without_words_of_the_system(error: OSError) -> None:
    message = str(unreadable_error(Path("file"), error))
    assert "(None)" not in message and "()" not in message


@pytest.mark.slow
def test_only_the_first_rank_says_it() -> None:
    done = run_program("-m", "llama", "chat", "--loud", ranks=2)
    assert done.stderr.count("error: unknown option --loud") == 1


@pytest.mark.slow
def test_a_terminal_shows_a_sign_of_life_and_a_pipe_none(tmp_path: Path) -> None:
    command = ["-m", "llama", "complete", "a", "--ckpt_dir", str(write_checkpoint(tmp_path / "ckpt"))]
    command += ["--device", "cpu", "--dtype", "float32", "--temperature", "0", "--max_gen_len", "3"]
    piped = run_program(*command)
    assert (piped.returncode, piped.stderr) == (0, "")
    terminal = Terminal(*command)
    try:
        before = terminal.wait_for(r"\(starting \.\.\.\)")
        assert before == "(starting ...)"
        terminal.wait_for(r"^\r\x1b\[K\(loading [^)]*ckpt \.\.\.\)")
        terminal.wait_for(r"\r\x1b\[K" + re.escape(piped.stdout.strip()))
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


@pytest.mark.slow
def test_a_terminal_that_cannot_erase_gets_lines() -> None:
    terminal = Terminal("-m", "llama", "chat", "--help", TERM="dumb")
    try:
        assert re.fullmatch(r"\(starting \.\.\.\)\r\nusage: ", terminal.wait_for("usage: "))
    finally:
        terminal.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    directory = write_checkpoint(tmp_path_factory.mktemp("talk") / "ckpt")
    return Llama.build(directory, max_seq_len=64, max_batch_size=1, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("lines", "answers"),
    [
        *(([word, "never read"], 0) for word in ("quit", "exit", "/exit", "/quit", "QUIT", "  exit ")),
        (['"""exit"""', "How do I quit?", "exit now", "exit", "never read"], 3),
    ],
)
def test_words_that_leave_the_chat(
    llama: Llama, lines: list[str], answers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    asked = []
    monkeypatch.setattr(Chat, "_reply", lambda self, messages: asked.append(messages))
    talk(llama, None, {"max_gen_len": 1})
    assert len(asked) == answers
    assert capsys.readouterr() == ("", "")


def test_a_chats_command_that_is_misspelt(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/sytem You\n")))
    talk(llama, None, {})
    assert capsys.readouterr().err == "(error: unknown command /sytem; /help lists all; did you mean /system?)\n"


@pytest.mark.parametrize(
    ("before", "now", "says"), [(None, "int8", "(not set, now 'int8')"), ("int8", None, "('int8', now not set)")]
)
def test_a_setting_that_was_not_given(before: str | None, now: str | None, says: str) -> None:
    with pytest.raises(LlamaError) as caught:
        check_same_job(Path("answers.part"), {"quantization": before}, {"quantization": now})
    assert says in str(caught.value) and "None" not in str(caught.value)
