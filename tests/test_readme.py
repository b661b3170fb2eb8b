"""README.md tells the truth: its Python runs, its tables of options are the programs' own, its files exist."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import ROOT, run_program

README = (ROOT / "README.md").read_text(encoding="utf-8")


PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_of_the_readme_runs() -> None:
    """Each piece goes on from those before it."""
    programs = [program for program in PROGRAMS if "TaskModel" not in program]
    done = run_program("-c", "\n".join(programs))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The capital of France is Paris.") == 2
    assert "proposed tokens that were right: 0." in done.stdout


@pytest.mark.slow
def test_the_tasks_of_the_readme(tmp_path: Path) -> None:
    """Its commands, on a few of the records and for an epoch; then its Python, and the program of its table."""
    commands = re.findall(r"^python (-m (?:demo.tasks|llama finetune) .*)$", README, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        words = [str(tmp_path / word) if word.startswith("out/") else word for word in command.split()]
        done = run_program(*(["1" if before == "--epochs" else word for before, word in pairwise(["", *words])]))
        assert done.returncode == 0, done.stderr
        if "--output" in words and "demo.tasks" in words:
            for name in ("train", "eval"):
                file = tmp_path / "out" / words[2] / f"{name}.jsonl"
                lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
                file.write_text("".join(lines[:64]), encoding="utf-8")
    (program,) = (program for program in PROGRAMS if "TaskModel" in program)
    done = run_program("-c", program.replace('"out/', f'"{tmp_path}/out/'))
    assert done.returncode == 0, done.stderr
    shown = run_program("-m", "demo.evaluate_tasks", str(tmp_path / "out"))
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["task", "topics", "places", "questions"], (
        shown.stderr
    )


def test_every_option_of_the_readme_is_an_option() -> None:
    options = re.findall(r"^\| `(--\w+)`", README, re.MULTILINE)
    assert len(options) >= 10
    shown = run_program("example_chat_completion.py", "--help")
    text = shown.stdout + shown.stderr
    for option in options:
        assert option in text


def test_what_inspect_prints_is_what_it_prints() -> None:
    command = next(line for line in README.splitlines() if line.startswith("python -m llama inspect"))
    shown = run_program(*command.split()[1:])
    assert f"```\n{shown.stdout}```" in README


def test_the_file_of_prompts_gets_the_answers_that_are_shown(tmp_path: Path) -> None:
    prompts, answers = re.findall(r"```jsonl\n(.*?)```", README, re.DOTALL)
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    command = next(line for line in README.splitlines() if line.startswith("python -m llama complete --input"))
    given = [f"{tmp_path}/{word}" if word.endswith(".jsonl") else word for word in command.split()[1:]]
    done = run_program(*given)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == answers


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:llama|demo|tests)/[\w/]*(?:\.\w+)?)`", README))))
def test_every_file_of_the_readme_exists(name: str) -> None:
    assert (ROOT / name).exists()


def test_there_are_two_commands_and_they_use_the_tested_versions() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c constraints.txt" in command for command in commands)
