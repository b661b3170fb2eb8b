"""The layout of the code is as designed: sizes of files, the order of imports, what is loaded when, the floor plan."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, environment, run_program

MOST_LINES = 400  # of a file of the package
MOST_LINES_OF_GROUND_FLOOR = 2000  # of all files of `llama/` itself: fewer than these
MOST_LINES_OF_README = 200


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_of_the_package_is_too_long() -> None:
    paths = [path for path in (ROOT / "llama").rglob("*") if path.suffix in (".py", ".c", ".h")]
    assert len(paths) > 100
    assert {str(path): lines for path in paths if (lines := count_lines(path)) > MOST_LINES} == {}


def test_the_ground_floor_is_read_in_one_sitting() -> None:
    assert sum(map(count_lines, (ROOT / "llama").glob("*.py"))) < MOST_LINES_OF_GROUND_FLOOR


def test_the_readme_is_read_in_two_minutes() -> None:
    assert count_lines(ROOT / "README.md") <= MOST_LINES_OF_README


def test_import_llama_loads_llama_alone() -> None:
    program = """
import sys
before = {*sys.modules}
import llama
loaded = {*sys.modules} - before
print(sorted(name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names))
"""
    done = run_program("-c", program)
    assert done.stdout == "['llama']\n", done.stderr


UNNEEDED = [
    *("llama.bench", "llama.training", "llama.tasks", "llama.cli", "llama.adapters"),
    *("transformers", "matplotlib", "torchmetrics", "torch._dynamo"),
]


def test_a_built_model_loads_no_wing_that_it_does_not_need() -> None:
    program = f"""
import sys, llama
llama.Llama.build("demo/model")
print([name for name in {UNNEEDED} if name in sys.modules], "llama.engine" in sys.modules)
"""
    done = run_program("-c", program)
    assert done.stdout == "[] True\n", done.stderr


def test_imports_run_downwards() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_floor_plan_is_the_contracts() -> None:
    program = runpy.run_path(str(ROOT / "docs" / "floor_plan.py"))
    assert program["PICTURE"].read_text(encoding="utf-8") == program["draw"](), "run python docs/floor_plan.py"


@pytest.mark.parametrize("room", [path.parent.name for path in sorted((ROOT / "llama").glob("[!_]*/__init__.py"))])
def test_every_wing_has_a_page(room: str) -> None:
    assert f"`llama/{room}/`" in (ROOT / "docs" / f"{room}.md").read_text(encoding="utf-8").splitlines()[0]
