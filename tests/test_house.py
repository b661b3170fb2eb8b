"""The layout of code and tests is as designed: sizes of files, who imports whom, what is loaded, the floor plan."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, environment, run_program

MOST_LINES = 400  # of a file of the package
MOST_LINES_OF_GROUND_FLOOR = 2000  # of all files of `llama/` itself: fewer than these
MOST_LINES_OF_README = 200
MOST_LINES_OF_TESTS = 500  # of a file of tests


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


def test_no_file_of_tests_is_too_long() -> None:
    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert len(paths) > 70
    assert {str(path): lines for path in paths if (lines := count_lines(path)) > MOST_LINES_OF_TESTS} == {}


def list_imports(path: Path) -> set[str]:
    """The modules that a file imports, also inside of functions."""
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    named = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            named |= {node.module or "", *(f"{node.module or ''}.{name.name}" for name in node.names)}
    return named


def test_no_file_of_tests_imports_a_test_module() -> None:
    """What several test modules need stands in a support module beside them, or in `tests/`."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    modules = {path.stem for path in paths if path.stem.startswith("test_")}
    assert len(modules) > 50
    imported = {str(path): modules & set(".".join(list_imports(path)).split(".")) for path in paths}
    assert {path: names for path, names in imported.items() if names} == {}


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


FLOOR_PLAN = str(ROOT / "docs" / "floor_plan.py")


def test_every_room_has_a_place_in_the_contract() -> None:
    """Import-linter says nothing of a room that no layer names."""
    layers, _ = runpy.run_path(FLOOR_PLAN)["read_contracts"]()
    files = {path.stem for path in (ROOT / "llama").glob("*.py")} - {"__init__", "__main__"}
    wings = {path.parent.name for path in (ROOT / "llama").glob("*/__init__.py")}
    assert sorted(room for layer in layers for room in layer) == sorted(f"llama.{room}" for room in files | wings)


def test_the_floor_plan_is_the_contracts() -> None:
    program = runpy.run_path(FLOOR_PLAN)
    assert program["PICTURE"].read_text(encoding="utf-8") == program["draw"](), "run python docs/floor_plan.py"


@pytest.mark.parametrize("room", [path.parent.name for path in sorted((ROOT / "llama").glob("[!_]*/__init__.py"))])
def test_every_wing_has_a_page(room: str) -> None:
    assert f"`llama/{room}/`" in (ROOT / "docs" / f"{room}.md").read_text(encoding="utf-8").splitlines()[0]
