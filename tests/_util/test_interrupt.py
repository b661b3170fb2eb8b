"""Ctrl-C at any moment of a program's first seconds: one line, exit status 130, and no traceback."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny import ROOT, environment, launched, run_program

RUN = "{}\nprint('begun', flush=True)\n{}, run_name='__main__')"
COMMAND = RUN.format("sys.argv[1:] = 'chat --device cpu'.split()", "run_module('llama'")  # it waits for its input
WITHOUT_END = "builtins.print = lambda *_, file=None, **__: file or time.sleep(600)"  # a fast machine is soon done
EXAMPLE = RUN.format(
    "import builtins, fire, llama.cli.program, time; sys.argv[1:] = '--device cpu'.split()",
    f"{WITHOUT_END}\nrun_path('example_text_completion.py'",
)
GUARDED = "from llama.cli.program import errors_in_one_line\nwith errors_in_one_line():\n"


def interrupt(command: str, seconds: float) -> tuple[int, str]:
    """(exit status, standard error) of a program that gets the signal so long after Python itself has started."""
    begin = "import sys\nfrom runpy import run_module, run_path\n"
    program = subprocess.Popen(
        launched("-c", begin + command),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    program.stdout.readline()
    time.sleep(0.1 + seconds)
    program.send_signal(signal.SIGINT)
    program.wait()
    return program.returncode, program.communicate()[1]


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5])
def test_while_a_command_starts(seconds: float) -> None:
    assert interrupt(COMMAND, seconds) == (130, "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", [COMMAND, EXAMPLE])
@pytest.mark.parametrize("seconds", [0.2 * i for i in range(12)])
def test_at_many_moments(command: str, seconds: float) -> None:
    assert interrupt(command, seconds) == (130, "interrupted\n")


def interrupted_program(body: str) -> subprocess.CompletedProcess:
    """Run the lines under `errors_in_one_line`. `ctrl_c()` in them is the signal."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    begin = "import os, signal, sys\nctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    return run_program("-c", begin + GUARDED + lines)


def test_an_error_that_the_signal_became_is_the_signal() -> None:
    """As numpy's import makes an ImportError of it."""
    done = interrupted_program("try:\n    ctrl_c()\nexcept KeyboardInterrupt:\n    raise ImportError('numpy failed')")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_what_is_temporary_is_removed(tmp_path: Path) -> None:
    place = str(tmp_path)
    done = interrupted_program(f"import tempfile\nwith tempfile.TemporaryDirectory(dir={place!r}):\n    ctrl_c()")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    done = interrupted_program("try:\n    ctrl_c()\nfinally:\n    ctrl_c()\n    print('went on')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_other_errors_stay_what_they_are() -> None:
    done = interrupted_program("raise ImportError('none')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ImportError: none" in done.stderr


def test_ranks_say_it_once(tmp_path: Path) -> None:
    """Each gets the signal, as torchrun sends it; here without torchrun, which shows a traceback of its own."""
    begin = "import os, signal, sys, time\n" + GUARDED
    body = f"    open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w')\n    time.sleep(60)\n"
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ranks = [
        subprocess.Popen(
            launched("-c", begin + body),
            cwd=ROOT,
            env={**environment(), **world, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGINT)
    assert [rank.communicate()[1] for rank in ranks] == ["interrupted\n", ""]
    assert [rank.returncode for rank in ranks] == [130, 130]
