"""The cache of compiled kernels: failures are remembered, hangs bounded and said, and nobody else's code is loaded.

Compilers here are scripts, found by PATH as any compiler is, so that this runs on every processor.
"""

import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, environment

from llama._util.files import cache_home
from llama._util.processes import has_ended, read_stat
from llama.accelerate.kernels import build, levels

REAL = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(sys.platform == "win32" or REAL is None, reason="scripts and a compiler are needed")

NAMES = ["pack", "swiglu_float"]
LEVEL = levels.Level("any", frozenset(), ("-Wall",))
PROGRAM = "from llama.accelerate.kernels import build, levels"  # of another process begins so
GOOD = "long pack(void) { return 1; } long swiglu_float(void) { return 2; }"
# A compiler that takes any flags: an object is empty, and what is linked is made of a source of the test.
SCRIPT = """#!/bin/sh
echo called >> {home}/calls
{before}
case "$*" in
*-shared*) for last in "$@"; do :; done; exec {real} -shared -fPIC {home}/stub.c -o "$last" ;;
*) for source in "$@"; do :; done; name=$(basename "$source" .c); : > "$name.o" ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    write_compiler(tmp_path)
    return tmp_path


def load(*names: str) -> ctypes.CDLL | None:
    """The library, if it has these functions; NAMES where none are given."""
    return build.load_library(names or NAMES, [LEVEL])


def write_compiler(home: Path, before: str = "", code: str = GOOD) -> None:
    (home / "stub.c").write_text(code)
    path = home / "bin" / "cc"
    path.write_text(SCRIPT.format(home=home, before=before, real=REAL))
    path.chmod(0o755)


def calls(home: Path) -> int:
    path = home / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kernels(home: Path) -> Path:
    return home / ".cache" / "llama" / "kernels"


def living(groups: list[int]) -> list[int]:
    """The processes of these groups that haven't ended."""
    found = [(int(path.name), read_stat(int(path.name))) for path in Path("/proc").glob("[0-9]*")]
    return [process for process, stat in found if stat and int(stat[2]) in groups and not has_ended(process)]


def kinds(home: Path) -> list[str]:
    return sorted(path.suffix for path in kernels(home).iterdir())


def test_it_is_compiled_once_and_kept_in_a_directory_of_ones_own(home: Path) -> None:
    for _ in range(2):
        library = load()
        assert library is not None and library.pack() == 1
    assert calls(home) == len(levels.SOURCES) + 1
    assert kinds(home) == [".so"]
    assert stat.S_IMODE(kernels(home).stat().st_mode) == 0o700


def test_a_failure_is_remembered_by_version(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_compiler(home, "echo 'no space for a register' >&2; exit 1")
    assert load() is None
    first = calls(home)
    assert "can't be compiled" in (said := capsys.readouterr().err) and "no space for a register" in said
    assert load() is None
    assert calls(home) == first, "the compiler isn't called again"
    assert "no space for a register" in capsys.readouterr().err
    write_compiler(home, ": another version")
    assert load() is not None


def test_a_failure_is_forgotten_after_a_day(home: Path) -> None:
    write_compiler(home, "exit 1")
    assert load() is None
    (failure,) = kernels(home).glob("*.failed")
    first, old = calls(home), time.time() - 2 * 86400
    os.utime(failure, (old, old))
    assert load() is None
    assert calls(home) > first


def test_a_failure_that_cannot_be_read_is_none(home: Path) -> None:
    write_compiler(home, "exit 1")
    assert load() is None
    (failure,) = kernels(home).glob("*.failed")
    first = calls(home)
    failure.unlink()
    os.mkfifo(failure)
    assert load() is None
    assert calls(home) > first


def test_other_sources_are_compiled_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_compiler(home, "exit 1")
    assert load() is None
    first = calls(home)
    monkeypatch.setattr(levels, "FLAGS", [*levels.FLAGS, "-g"])
    assert load() is None
    assert calls(home) > first


def test_a_processor_without_a_level_is_no_failure_to_tell_of(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.load_library(NAMES, []) is None
    assert calls(home) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("hang", ["exec sleep 100", "sleep 100", "sleep 100 & wait", "trap '' TERM INT; sleep 100"])
def test_a_compiler_that_hangs_is_told_of_and_ended(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hang: str
) -> None:
    monkeypatch.setattr(build, "SECONDS_TO_COMPILE", 0.5)
    monkeypatch.setattr(build, "SECONDS_BEFORE_WORD", 0.1)
    write_compiler(home, f"echo $$ >> {home}/pids; {hang}")
    started = time.monotonic()
    assert load() is None
    assert time.monotonic() - started < 5
    said = capsys.readouterr().err
    assert "compiling the kernels" in said and "wasn't done after 0.5 s" in said
    groups = [int(line) for line in (home / "pids").read_text().split()]
    assert groups
    while living(groups):  # a process that was killed ends when the system comes to it
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    first = calls(home)
    assert load() is None
    assert calls(home) == first


def test_the_wait_is_bounded() -> None:
    assert build.SECONDS_BEFORE_WORD <= 5 and build.SECONDS_TO_COMPILE <= 60


@pytest.mark.parametrize(
    "code", ["", "long pack(void) { return 1; }", "long swiglu_float(void) { return 1; }"], ids=["none", "one", "other"]
)
def test_a_library_without_our_functions_is_no_library(
    home: Path, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_compiler(home, code=code)
    assert load() is None
    assert "is no library of these functions" in capsys.readouterr().err
    first = calls(home)
    assert load() is None
    assert calls(home) == first


def test_a_kept_library_without_our_functions_is_made_again(home: Path) -> None:
    """Also where this process has loaded it."""
    write_compiler(home, code="long other(void) { return 1; }")
    assert load("other") is not None
    (path,) = kernels(home).glob("*.so")
    (home / "stub.c").write_text(GOOD)
    library = load()
    assert library is not None and library.swiglu_float() == 2
    program = f"{PROGRAM}; assert build.load_library({NAMES}, [levels.{LEVEL}]).pack() == 1"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**environment(), **os.environ}, check=True)
    assert calls(home) == 2 * (len(levels.SOURCES) + 1)
    assert [*kernels(home).iterdir()] == [path]


@pytest.mark.parametrize("made", ["-o", "a text"])
def test_a_compiler_that_writes_something_else(home: Path, made: str) -> None:
    write_compiler(
        home, "exit 0" if made == "-o" else f'case "$*" in *-shared*) echo {made} > kernels.so; exit 0;; esac'
    )
    assert load() is None
    assert kinds(home) == [".failed"]


def test_what_cannot_be_run_is_a_failure(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "bin" / "cc").write_text("no script")
    (home / "bin" / "cc").write_bytes(b"\x7fELF")
    assert load() is None
    assert "can't be run" in capsys.readouterr().err
    assert kinds(home) == [".failed"]


# --- whose code it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o1777, 0o722])
@pytest.mark.parametrize("place", [".cache/llama/kernels", ".cache/llama"])
def test_a_directory_that_others_may_write_to_is_refused(
    home: Path, place: str, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load() is not None
    (home / place).chmod(mode)
    assert load() is None
    said = capsys.readouterr().err
    assert f"{home / place} may be written to by others" in said and "remove" in said
    assert stat.S_IMODE((home / place).stat().st_mode) == mode, "what may hold others' code isn't made ours"


def test_a_directory_that_others_may_read_becomes_private(home: Path) -> None:
    kernels(home).mkdir(parents=True, mode=0o755)
    kernels(home).parent.chmod(0o755)
    assert load() is not None
    assert stat.S_IMODE(kernels(home).stat().st_mode) == 0o700


def test_no_umask_makes_it_writable_by_others(home: Path) -> None:
    before = os.umask(0)
    try:
        assert load() is not None
    finally:
        os.umask(before)
    for place in (kernels(home), kernels(home).parent, kernels(home).parent.parent):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("place", ["directory", "library"])
def test_what_belongs_to_another_user_is_not_loaded(home: Path, place: str) -> None:
    assert load() is not None
    (library,) = kernels(home).glob("*.so")
    os.chown(kernels(home) if place == "directory" else library, 12345, 12345)
    assert (load() is None) == (place == "directory")
    (library,) = kernels(home).glob("*.so")
    assert library.stat().st_uid == (0 if place == "library" else library.stat().st_uid), "it is made again"


def test_a_library_that_others_may_write_to_is_made_again(home: Path) -> None:
    assert load() is not None
    (library,) = kernels(home).glob("*.so")
    library.chmod(0o666)
    first = calls(home)
    assert load() is not None
    assert calls(home) > first
    assert not library.stat().st_mode & 0o022


@pytest.mark.parametrize("value", ["", None, "relative"])
def test_without_a_home_in_the_environment_it_is_the_users(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    import pwd

    if value is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", value)
    assert cache_home() == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "llama"
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(RuntimeError):
        cache_home()
    assert load() is None


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_what_a_killed_build_left_is_swept(home: Path) -> None:
    write_compiler(home, f"echo $$ >> {home}/pids; sleep 100")
    program = f"{PROGRAM}; build.load_library({NAMES}, [levels.{LEVEL}])"
    running = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**environment(), **os.environ})
    end = time.monotonic() + 60
    while not (home / "pids").exists() or len((home / "pids").read_text().split()) < len(levels.SOURCES):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    build.sweep(kernels(home))
    assert any(kernels(home).glob(".partial-*")), "a build that runs is left alone"
    running.send_signal(signal.SIGKILL)
    running.wait()
    for group in map(int, (home / "pids").read_text().split()):  # the compilers outlive it
        os.killpg(group, signal.SIGKILL)
    (kernels(home) / "tmpabcdef").mkdir()
    (kernels(home) / "tmpabcdef" / "products.o").touch()
    write_compiler(home)
    assert load() is not None
    assert kinds(home) == [".so"]


def test_an_interrupted_build_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SECONDS_BEFORE_WORD", 0.1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "print_note", interrupt)
    write_compiler(home, f"echo $$ >> {home}/pids; sleep 100")
    with pytest.raises(KeyboardInterrupt):
        load()
    assert kinds(home) == []
