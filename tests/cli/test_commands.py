"""The commands as a user types them: what they print, how they end. (`chat`: test_chat.py, test_chat_terminal.py.)"""

import subprocess
import sys

import pytest
from tiny import ROOT, run_program, write_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("cli") / "ckpt"))


def arguments(directory: str) -> list[str]:
    return ["--ckpt_dir", directory, "--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("program", "ranks"),
    [
        ("example_text_completion.py", 1),
        pytest.param("example_text_completion.py", 4, marks=pytest.mark.slow),
        pytest.param("example_chat_completion.py", 2, marks=pytest.mark.slow),
    ],
)
def test_examples_run_on_the_demo_model_alike_on_any_ranks(program: str, ranks: int) -> None:
    plain = run_program(program, "--device", "cpu", "--dtype", "float32")
    assert plain.returncode == 0, plain.stderr
    assert plain.stderr == ""
    assert plain.stdout.count("\n> ") == 4
    assert plain.stdout.count("==================================") == 4
    under_torchrun = run_program(program, "--device", "cpu", "--dtype", "float32", ranks=ranks)
    assert under_torchrun.stdout == plain.stdout


def test_examples_take_metas_options(directory: str) -> None:
    done = run_program(
        "example_text_completion.py",
        *arguments(directory),
        *("--tokenizer_path", f"{directory}/tokenizer.model", "--temperature", "0", "--top_p", "0.5"),
        *("--max_seq_len", "256", "--max_gen_len", "3", "--max_batch_size", "4"),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_dir", "/nowhere"], "ckpt_dir /nowhere: found nothing there"),
        (["--max_batch_size", "0"], "max_batch_size is 0"),
        (["--max_seq_len", "8"], "max_seq_len is 8"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temprature", "1"], "unknown option --temprature; known are --adapter_dir, --ckpt_dir,"),
        (["-x", "1"], "unknown option -x"),
        (["--seed", "foo"], "seed is 'foo'"),
        (["--ckpt_dir"], "--ckpt_dir has no value"),
        (["--ckpt_dir="], "ckpt_dir is '', expected the path"),
    ],
)
@pytest.mark.slow
def test_mistakes_get_one_line(options: list[str], message: str) -> None:
    done = run_program("example_text_completion.py", *options)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


@pytest.mark.slow
def test_complete_prints_what_generate_returns(directory: str) -> None:
    command = ["-m", "llama", "complete", "[1, 2]", *arguments(directory), "--max_gen_len", "9", "--temperature", "0"]
    done = run_program(*command)
    assert done.returncode == 0, done.stderr
    program = (
        "import sys; from llama import Llama; l = Llama.build(sys.argv[1], device='cpu', dtype='float32');"
        "print(l.text_completion(['[1, 2]'], temperature=0, max_gen_len=9)[0]['generation'])"
    )
    assert done.stdout == run_program("-c", program, directory).stdout
    assert run_program(*command, ranks=2).stdout == done.stdout


@pytest.mark.slow
def test_an_empty_text_is_refused(directory: str) -> None:
    done = run_program("-m", "llama", "complete", "", *arguments(directory))
    assert done.returncode == 1
    assert done.stderr == "error: prompt 0 is empty: give it at least one character\n"


@pytest.mark.parametrize("command", ["chat", "complete"])
@pytest.mark.slow
def test_bad_sampling_is_refused_at_once(command: str) -> None:
    text = ["hello"] if command == "complete" else []
    done = run_program("-m", "llama", command, *text, "--top_p", "5", input="hi\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: top_p is 5.0, expected a number in (0, 1]\n"


@pytest.mark.slow
def test_a_text_that_leaves_no_room_is_refused() -> None:
    done = run_program("-m", "llama", "complete", "hello", "--max_seq_len", "2")
    assert done.returncode == 1
    assert "leaves no room for an answer within 2" in done.stderr


@pytest.mark.parametrize("redirection", [">&-", "<&-", "> /dev/full"])
@pytest.mark.slow
def test_closed_and_full_streams_are_no_crash(directory: str, redirection: str) -> None:
    command = f"{sys.executable} -m llama chat {' '.join(arguments(directory))} --max_gen_len 3 {redirection}"
    done = subprocess.run(["bash", "-c", command], input="hi\n", cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.slow
def test_a_terminal_of_few_characters_gets_question_marks() -> None:
    program = "example_chat_completion.py --device cpu"
    done = subprocess.run(
        ["bash", "-c", f"PYTHONIOENCODING=ascii {sys.executable} {program}"], cwd=ROOT, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"> Assistant: ?" in done.stdout


@pytest.mark.slow
def test_the_demos_programs_say_mistakes_in_a_line_too() -> None:
    done = run_program("-m", "demo.evaluate", "--ckpt_dir", "nope")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ckpt_dir nope: found nothing there")


def test_no_command_and_unknown_options_show_the_usage() -> None:
    for command in ([], ["sing"], ["complete", "hello", "--loud"]):
        done = run_program("-m", "llama", *command)
        assert done.returncode == 2
        assert "usage: python -m llama" in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_crash(directory: str) -> None:
    text = f"{sys.executable} -m llama complete hello {' '.join(arguments(directory))} | true"
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.stderr == ""


def test_what_takes_seconds_is_not_imported_until_it_is_used() -> None:
    slow = "'torch._dynamo', 'sympy', 'transformers', 'matplotlib', 'llama_cpp', 'triton'"
    program = "import sys, llama, llama.__main__\nllama.Llama.build('demo/model').generate([[1, 2, 3]], 4)\n"
    done = run_program("-c", f"{program}print([name for name in ({slow}) if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(("command", "wings"), [("complete hello", []), ("bench", ["llama.bench"])])
def test_a_command_loads_no_wing_of_another(command: str, wings: list[str]) -> None:
    program = "import sys; from llama.cli.commands import parse\nparse()\n"
    show = "print([name for name in ('llama.bench', 'llama.training', 'matplotlib', 'fire') if name in sys.modules])"
    done = run_program("-c", program + show, *command.split())
    assert done.stdout == f"{wings}\n", done.stderr


def test_the_list_of_commands_loads_no_torch() -> None:
    program = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
    done = run_program("-c", f"{program}from llama.cli.commands import parse\nparse()", "--help")
    assert done.stdout.startswith("usage: python -m llama") and done.stdout.endswith("False\n"), done.stderr
