"""`--help` of every command: it is complete, and what it shows is right."""

import argparse
import json
import re
import sys

import pytest

from llama.cli.commands import COMMANDS, parse
from llama.cli.finetune import RECORDS
from llama.cli.mistakes import Parser
from llama.training.registry import TRAINING_TASKS


@pytest.fixture
def show_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def show(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["llama", *words, "--help"])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            parse()
        out, err = capsys.readouterr()
        assert (ended.value.code, err) == (0, "")
        return out

    return show


def test_the_list_of_commands(show_help) -> None:
    out = " ".join(show_help().split())
    assert all(f"{name} {purpose}" in out for name, purpose in COMMANDS.items())
    assert "torchrun --nproc_per_node N -m llama COMMAND" in out and "demo model" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help(show_help, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option has a purpose, and lines fit a terminal of 80 columns, but for records."""
    added: list[argparse.Action] = []
    add = argparse.ArgumentParser._add_action
    monkeypatch.setattr(Parser, "_add_action", lambda self, action: added.append(action) or add(self, action))
    out = show_help(name)
    assert all(action.help for action in added), [action.dest for action in added if not action.help]
    assert all(len(line) <= 80 for line in out.replace(RECORDS, "").splitlines())


def test_the_records_that_finetune_shows_are_taken(show_help) -> None:
    """Each is read by the check of its task, with a text that has what its spans and answers say."""
    assert RECORDS in show_help("finetune")
    shown = re.findall(r"^  (\w+|) +(\{.*\})", RECORDS, re.MULTILINE)
    assert {task for task, _ in shown if task} == TRAINING_TASKS.keys()
    task, checked = "", 0
    for name, text in shown:
        task = name or task
        for record in text.split(" or "):
            record = record.replace(
                "[...]", '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
            )
            record = record.replace('"context": "..."', '"context": "It is not a city: Riga"')
            TRAINING_TASKS[task].check(json.loads(record))
            checked += 1
    assert checked == 7


def test_an_initial_that_fires_help_shows_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from llama.cli.program import run

    seen = []
    for words, taken in ((["-s", "5"], True), (["--seed", "5"], True), (["-d", "cpu"], False), (["-x", "1"], False)):
        sys_argv, sys.argv = sys.argv, ["program", *words]
        try:
            run(lambda seed=1, device=None, dtype=None: seen.append(seed))
            assert taken
        except SystemExit:
            assert not taken and f"unknown option {words[0]}" in capsys.readouterr().err
        finally:
            sys.argv = sys_argv
    assert seen == [5, 5]


def test_the_help_of_serve_has_the_defaults_of_serve(show_help) -> None:
    text = " ".join(show_help("serve").split())
    assert "divide logits by X; 0 takes the likeliest token (default: 1)" in text
    assert "tokens of mass X (default: 1)" in text and "requests that have none" in text
