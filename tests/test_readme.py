"""README.md and the pages of docs/ tell the truth: their Python runs, their options are the programs' own, what they
name and link to exists."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import ROOT, run_program

PATHS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]


def find_programs(page: str, with_output: bool) -> list[str]:
    """A page's pieces of Python. with_output: those that use directories in out/, or those that don't."""
    programs = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    return [program for program in programs if ('"out/' in program) == with_output]


def run_page(page: str) -> str:
    """What the page's Python prints. Each piece goes on from those before it."""
    done = run_program("-c", "\n".join(find_programs(page, with_output=False)))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_readme_runs() -> None:
    assert run_page("README.md").count("The capital of France is Paris.") == 2


def test_the_python_of_the_page_on_generation_runs() -> None:
    assert "proposed tokens that were right: 0." in run_page("docs/engine.md")


def test_the_python_of_the_page_on_the_fast_form_runs() -> None:
    assert "the edit changed the logits: True" in run_page("docs/accelerate.md")


RUN_BY_NAME = {"README.md", "docs/engine.md", "docs/accelerate.md"}
OTHERS = sorted(page for page in PAGES.keys() - RUN_BY_NAME if find_programs(page, with_output=False))


@pytest.mark.parametrize("page", OTHERS)
def test_the_python_of_other_pages_runs(page: str) -> None:
    run_page(page)


@pytest.mark.slow
def test_the_tasks_of_the_docs(tmp_path: Path) -> None:
    """Their commands, on a few of the records and for an epoch; then their Python, and the program of the table."""
    pattern = re.compile(r"^python (-m (?:demo.tasks|llama finetune) .*)$", re.MULTILINE)
    commands = pattern.findall(PAGES["docs/training.md"])
    assert len(commands) == 6
    for command in [*commands, *pattern.findall(PAGES["docs/adapters.md"])]:
        words = [str(tmp_path / word) if word.startswith("out/") else word for word in command.split()]
        done = run_program(*(["1" if before == "--epochs" else word for before, word in pairwise(["", *words])]))
        assert done.returncode == 0, done.stderr
        if "--output" in words and "demo.tasks" in words:
            for name in ("train", "eval"):
                file = tmp_path / "out" / words[2] / f"{name}.jsonl"
                lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
                file.write_text("".join(lines[:64]), encoding="utf-8")
    programs = [program for page in PAGES for program in find_programs(page, with_output=True)]
    assert any("places.tag" in program for program in programs)
    for program in programs:
        done = run_program("-c", program.replace('"out/', f'"{tmp_path}/out/'))
        assert done.returncode == 0, done.stderr
    shown = run_program("-m", "demo.evaluate_tasks", str(tmp_path / "out"))
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["task", "topics", "places", "questions"], (
        shown.stderr
    )


def test_every_option_of_the_table_is_an_option() -> None:
    options = re.findall(r"^\| `(--\w+)`", PAGES["docs/cli.md"], re.MULTILINE)
    assert len(options) >= 10
    shown = run_program("example_chat_completion.py", "--help")
    text = shown.stdout + shown.stderr
    for option in options:
        assert option in text


def test_what_inspect_prints_is_what_it_prints() -> None:
    page = PAGES["docs/checkpoints.md"]
    command = next(line for line in page.splitlines() if line.startswith("python -m llama inspect"))
    shown = run_program(*command.split()[1:])
    assert f"```\n{shown.stdout}```" in page


def test_the_file_of_prompts_gets_the_answers_that_are_shown(tmp_path: Path) -> None:
    page = PAGES["docs/cli.md"]
    prompts, answers = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)
    (tmp_path / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("python -m llama complete --input"))
    words = [f"{tmp_path}/{word}" if word.endswith(".jsonl") else word for word in command.split()[1:]]
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == answers


FILES = re.compile(r"`((?:llama|demo|tests|docs|benchmarks)/[\w/]*(?:\.\w+)?)`")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    wanted = {"llama/server/"}  # named as a place for what is not there yet
    assert [name for name in FILES.findall(PAGES[page]) if not (ROOT / name).exists() and name not in wanted] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_what_the_table_of_changes_names_is_where_it_says() -> None:
    """Each name in its last column occurs in a file of the column before it."""
    table = PAGES["docs/architecture.md"].partition("## Where do I change")[2]
    rows = [row.strip("|").split("|") for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 10
    for change, files, names in rows:
        paths = FILES.findall(files)
        if not paths:
            assert "server" in change
            continue
        text = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
        for name in re.findall(r"`@?(\w+)[^`/]*`", names):
            assert re.search(rf"\b{name}\b", text), (change, name)


def test_every_module_is_named_on_a_page() -> None:
    paths = [str(path.relative_to(ROOT)) for path in (ROOT / "llama").rglob("*.py") if path.name != "__init__.py"]
    text = "\n".join(PAGES.values())
    assert [path for path in paths if "/_util/" not in path and f"`{path}`" not in text] == []


def test_there_are_two_commands_and_they_use_the_tested_versions() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c constraints.txt" in command for command in commands)
