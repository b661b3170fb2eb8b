"""A chat at a terminal: prompts, Ctrl-C, line editing, history, colours, and the terminal's settings afterwards."""

import json
import re
import time
from pathlib import Path

import pytest
from terminal import Terminal, home
from tiny import run_program, write_checkpoint

PROMPT = r"\n(\x1b\[\?2004h)?> $"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = write_checkpoint(tmp_path_factory.mktemp("terminal") / "ckpt", endless=True)
    options = ["--ckpt_dir", str(directory), "--device", "cpu", "--dtype", "float32"]
    return ["-m", "llama", "chat", *options, "--temperature", "0"]


def history(home: Path) -> list[str]:
    return json.loads((home / ".cache" / "llama" / "chat_history.json").read_text())


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_stops_the_answer_and_not_the_program(options: list[str], tmp_path: Path, ranks: int) -> None:
    terminal = Terminal(*options, "--max_seq_len", "20000", ranks=ranks, HOME=str(home(tmp_path)))
    try:
        terminal.wait_for(PROMPT)
        for _ in range(2):
            terminal.type("hello\r")
            terminal.wait_for(r"hello\r\n.{40}")
            terminal.type("\x03")
            terminal.wait_for(r" \[stopped\].*" + PROMPT)
            for line in ("/half a line", '"""half\ra block'):
                terminal.type(line)
                terminal.wait_for(line[-5:])
                time.sleep(0.2)  # Python hears no signal in the instant before it waits for a key
                terminal.type("\x03")
                terminal.wait_for(r"drops a line.*" + PROMPT)
        terminal.type("/quit\r")
        assert terminal.process.wait(timeout=30) == 0
        assert "error" not in terminal.shown
        assert terminal.echoes()
    finally:
        terminal.close()
    assert history(tmp_path) == ["hello", "/quit"], "what was dropped isn't remembered"


def test_lines_are_remembered_from_talk_to_talk(options: list[str], tmp_path: Path) -> None:
    env = {"HOME": str(home(tmp_path))}
    for keys, shown in (("/system é漢字🙂\r", "message: é漢字🙂"), ("\x1b[A" * 3 + "\r", "message: é漢字🙂")):
        terminal = Terminal(*options, "--max_gen_len", "9", **env)
        try:
            terminal.wait_for(PROMPT)
            terminal.type(keys)
            terminal.wait_for(shown + ".*" + PROMPT)
            terminal.type('"""\rtwo\rlines"""\r')
            terminal.wait_for("lines.*" + PROMPT)
            terminal.type("\x1b[A\x01\x0b/stats\r")  # the last entry, replaced
            terminal.wait_for("speed and its reuse.*are shown.*" + PROMPT)
            terminal.type("\x1b[A\x1b[A\x1b[A")
            terminal.wait_for("/system")
            terminal.type("\x01\x0b\x04")
            assert terminal.process.wait(timeout=30) == 0
        finally:
            terminal.close()
    once = ["/system é漢字🙂", '"""\ntwo\nlines"""', "/stats"]
    assert history(tmp_path) == once * 2
    assert (tmp_path / ".cache" / "llama" / "chat_history.json").stat().st_mode & 0o777 == 0o600


def test_a_paste_of_several_lines_is_one_message(options: list[str], tmp_path: Path) -> None:
    terminal = Terminal(*options, "--max_gen_len", "3", HOME=str(home(tmp_path)))
    try:
        terminal.wait_for(PROMPT)
        terminal.type("\x1b[200~one\ntwo\x1b[201~\r")
        terminal.wait_for("two.*" + PROMPT)
        terminal.type(f"/save {tmp_path}/d\r")
        terminal.wait_for("saved 2 messages")
    finally:
        terminal.close()
    assert json.loads((tmp_path / "d").read_text())[0]["content"] == "one\ntwo"


@pytest.mark.parametrize(
    ("env", "coloured"), [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
@pytest.mark.slow
def test_asides_are_dim_unless_no_color_is_asked_for(
    options: list[str], tmp_path: Path, env: dict[str, str], coloured: bool
) -> None:
    terminal = Terminal(*options, "--max_gen_len", "9", HOME=str(home(tmp_path)), **env)
    try:
        shown = terminal.wait_for(PROMPT)
        terminal.type("/stats\r")
        shown += terminal.wait_for("are shown.*" + PROMPT)
        terminal.type("hello\r")
        shown += terminal.wait_for("reused.*" + PROMPT)
        terminal.type("/help\r")
        shown += terminal.wait_for("Ctrl-C.*" + PROMPT)
    finally:
        terminal.close()
    assert (re.search(r"\x1b\[2m\([\d.]+ tokens/s, .* reused\)\x1b\[0m\r\n", shown) is not None) == coloured
    assert ("\x1b[2m" in shown) == coloured
    kept = re.sub(r"[^\n]*\x1b\[K", "", shown)  # what was shown while it started is erased
    lines = re.sub(r"\x1b\[[?\d]*[a-z]", "", kept).replace("\r", "").split("\n")
    assert max(map(len, lines)) < 80


def test_through_a_pipe_nothing_is_decorated_or_remembered(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = home(tmp_path)
    monkeypatch.setenv("HOME", str(where))
    done = run_program(*options, "--max_gen_len", "4", input="hello\n/stats\nyou\n")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\n> " not in done.stdout and "tokens/s" not in done.stdout
    assert "tokens/s" in done.stderr
    assert not (where / ".cache" / "llama" / "chat_history.json").exists()


@pytest.mark.parametrize("content", ["no JSON", '[1, "ok\\u0000", "\\ud800", "fine"]', None])
@pytest.mark.slow
def test_a_broken_or_unwritable_history_is_no_matter(options: list[str], tmp_path: Path, content: str | None) -> None:
    path = home(tmp_path) / ".cache" / "llama" / "chat_history.json"
    path.mkdir() if content is None else path.write_text(content)
    terminal = Terminal(*options, HOME=str(tmp_path))
    try:
        terminal.wait_for(PROMPT)
        terminal.type("/system new\r")
        terminal.wait_for("message: new.*" + PROMPT)
        terminal.type("/quit\r")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
    if content is not None:
        assert history(tmp_path)[-2:] == ["/system new", "/quit"]
    else:
        assert [p.name for p in path.parent.glob("chat_history*")] == ["chat_history.json"]


def test_an_end_from_outside_leaves_the_terminal_in_order(options: list[str], tmp_path: Path) -> None:
    terminal = Terminal(*options, HOME=str(home(tmp_path)))
    try:
        terminal.wait_for(PROMPT)
        assert not terminal.echoes(), "readline shows what is typed"
        time.sleep(0.2)  # Python hears no signal in the instant before it waits for a key
        terminal.process.terminate()
        assert terminal.process.wait(timeout=30) == 143
        assert terminal.echoes()
    finally:
        terminal.close()
