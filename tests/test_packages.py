"""The wheel and the sdist: what they hold, and that the commands of an installed package run outside of a checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT, run_program

from llama._util.packages import find_missing, install_command
from llama.accelerate.kernels import cpu, levels

BUILD = "import setuptools.build_meta as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")


def build(kind: str, source: Path, target: Path) -> Path:
    """The package of this kind, "wheel" or "sdist", that is made of the tree `source`."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


def install(package: Path, target: Path) -> Path:
    """Install a package without what it depends on, which this environment has."""
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(package)]
    done = subprocess.run(command, cwd=target.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    return folder


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    return build("wheel", folder / "source", folder)


@pytest.fixture(scope="module")
def sdist(folder: Path) -> Path:
    return build("sdist", folder / "source", folder)


def run_installed(target: Path, *command: str, **options: object) -> subprocess.CompletedProcess:
    """Run `python COMMAND...` with the package in `target`, in a directory that isn't the checkout's."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(target)}
    where = target.parent / "elsewhere"
    where.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *command], cwd=where, env=env, capture_output=True, text=True, timeout=120, **options
    )


def check_commands(target: Path) -> None:
    where = run_installed(target, "-c", "import llama; print(llama.__file__)")
    assert where.stdout.strip() == str(target / "llama" / "__init__.py"), where.stderr
    text = run_installed(target, "-m", "llama", "complete", "English to French:\n\nsea =>", "--max_gen_len", "2")
    assert (text.returncode, text.stderr) == (0, "")
    options = ["--temperature", "0", "--device", "cpu"]
    chat = run_installed(target, "-m", "llama", "chat", *options, input="What is the capital of France?\n")
    assert (chat.stdout, chat.stderr) == ("The capital of France is Paris.\n", "")
    report = run_installed(target, "-m", "llama", "inspect", str(target / "llama" / "demo_model"))
    assert (report.returncode, report.stderr) == (0, "")


@pytest.mark.slow
def test_a_wheel_runs_outside_of_the_checkout(folder: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as f:
        names = set(f.namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"llama"}, "tests, docs and the demo's programs stay in the checkout"
    sources = {f"llama/{path.relative_to(ROOT / 'llama')}" for path in (ROOT / "llama").rglob("*.[ch]")}
    models = {f"llama/demo_model/{path.name}" for path in (ROOT / "demo" / "model").iterdir()}
    assert len(sources) > 3 and len(models) == 3 and sources | models <= names
    check_commands(install(wheel, folder / "from_wheel"))


@pytest.mark.slow
@pytest.mark.skipif(cpu.library() is None, reason="no kernels were compiled for this processor")
def test_a_wheel_brings_the_kernels_of_each_level(folder: Path, wheel: Path, tmp_path: Path) -> None:
    """So that a machine without a compiler has them."""
    with zipfile.ZipFile(wheel) as f:
        built = {name for name in f.namelist() if "/built/" in name}
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    assert built == {f"llama/accelerate/kernels/built/{level.name}.so" for level in levels.LEVELS}
    target = install(wheel, folder / "with_kernels")
    program = "from llama.accelerate.kernels import cpu; print(cpu.library()._name)"
    nothing = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", program], env=nothing, cwd=tmp_path, capture_output=True, text=True)
    best = cpu.find_own_levels()[0].name
    assert done.stdout.strip() == str(target / f"llama/accelerate/kernels/built/{best}.so"), done.stderr
    assert not [*tmp_path.iterdir()], "nothing is compiled"


@pytest.mark.slow
def test_an_sdist_installs_and_holds_what_the_readme_speaks_of(folder: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as f:
        names = {name.partition("/")[2] for name in f.getnames()}
    files = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "constraints.txt", "requirements.txt"}
    programs = {"example_chat_completion.py", "example_text_completion.py", "tests/tiny.py", "demo/train.py"}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").iterdir() if path.is_file()}
    assert files | programs | pages <= names
    check_commands(install(sdist, folder / "from_sdist"))


def test_packages_that_are_missing() -> None:
    assert find_missing("json", "no_such_module_of_anybody") == ["no_such_module_of_anybody"]


def test_the_command_that_installs_is_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `pip` a shell finds: README's commands run .venv/bin/python without activating it."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert install_command("a", "b") == f"{sys.executable} -m pip install a b"
    done = subprocess.run([*install_command("pip").split()[:-2], "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("pip "), done.stderr
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert install_command("a") == "python -m pip install a"


def test_without_pip_the_command_is_uvs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert install_command("a", "b").startswith("uv pip install --python ")


def test_setuptools_is_imported_after_the_command_was_asked_for() -> None:
    """As torch.compile does when it builds C++: looking for pip must not turn setuptools' hook off."""
    done = run_program("-c", "from llama._util.packages import install_command as ask; ask('a'); import setuptools")
    assert done.returncode == 0, done.stderr
