"""A pipe, a socket, a device or a directory where a file is expected is named at once, wherever a path is opened."""

import ast
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from inspected import write_hf_tokenizer
from tiny import ARGS, ROOT, write_checkpoint

from llama import Llama, LlamaError
from llama._util.files import open_file, read_text, write_json, write_whole
from llama.adapters.peft import read_adapter
from llama.bench.plots import Chart, read_points
from llama.checkpoints.convert import convert
from llama.checkpoints.inspect import inspect
from llama.cli.batch import BatchFiles
from llama.cli.conversation import read_dialog, write_dialog
from llama.tokenization.hf_tokenizer import HFTokenizer, open_tokenizer
from llama.tokenizer import Tokenizer
from llama.training.dataset import read_lines
from llama.training.state import ResumableTraining

KINDS = {"pipe": "Is a pipe", "socket": "Is a socket", "device": "Is a device", "directory": "Is a directory"}
SECONDS = 10  # that nothing here takes, unless it waits for ever

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes have no paths there")


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """End a test that waits for a pipe or reads a device without end."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(path: Path, kind: str) -> Path:
    """Something that is no file, in the place of whatever is at `path`."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # since the path of a socket may have 108 bytes
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(path.name)
        os.fchdir(here)
        os.close(here)
    return path


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "meta")


@pytest.fixture(scope="module")
def hf(meta: Path) -> Path:
    directory = convert(meta, meta.parent / "hf", "hf") or meta.parent / "hf"
    (directory / "tokenizer.json").unlink(missing_ok=True)
    write_hf_tokenizer(directory)
    return directory


META = ("consolidated.00.pth", "params.json", "tokenizer.model")
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
HF = ("model.safetensors", "model.safetensors.index.json", "config.json", *BESIDE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("format", "name"), [*(("meta", n) for n in META), *(("hf", n) for n in HF)])
def test_in_a_checkpoint(request: pytest.FixtureRequest, tmp_path: Path, format: str, name: str, kind: str) -> None:
    directory = Path(shutil.copytree(request.getfixturevalue(format), tmp_path / "ckpt"))
    put(directory / name, kind)
    report = inspect(directory)
    assert not report.ok
    problems = "; ".join([*report.problems, *(file.problem or "" for file in report.files)])
    assert name in problems
    words = f"can't be read ({KINDS[kind]}): expected a file"
    assert f"{directory / name} {words}" in problems or "found a directory" in problems
    with pytest.raises(LlamaError, match=name):
        Llama.build(str(directory), device="cpu", dtype="float32")


def read_state(path: Path) -> None:
    """A training's state, which `restore` finds by its number."""
    path.rename(path.with_name("state-0-0.pt"))
    training = ResumableTraining(path.parent / "none", {}, False)
    training.directory = path.parent
    training.restore(lambda state: None)


def write_records(path: Path) -> None:
    """The records of a run, when the name of their file is taken."""
    path.rename(path.with_name("out.part"))
    source = path.with_name("in")
    source.write_text('{"prompt": "a"}\n')
    BatchFiles(str(source), str(path.with_name("out")), {}, force=False)


def read_records(path: Path) -> None:
    BatchFiles(str(path), str(path) + ".out", {}, force=False)


READERS: dict[str, Callable[[Path], object]] = {
    "a tokenizer": open_tokenizer,
    "Meta's tokenizer": Tokenizer,
    "Hugging Face's tokenizer": HFTokenizer,
    "training data": lambda path: read_lines(path, "language"),
    "a dialog": lambda path: read_dialog(str(path)),
    "an earlier benchmark": read_points,
    "a training's progress": lambda path: (
        ResumableTraining(path.parent, {}, False) if path.rename(path.with_name("training.json")) else None
    ),
    "a training's state": read_state,
    "prompts": read_records,
    "what is read by others": open_file,
    "a text": read_text,
}
WRITERS: dict[str, Callable[[Path], object]] = {
    "JSON": lambda path: write_json(path, {}),
    "a picture": lambda path: write_whole(path, lambda f: f.write(b"")),
    "a dialog": lambda path: write_dialog(str(path), [{"role": "user", "content": "a"}]),
    "answers": lambda path: BatchFiles(__file__, str(path), {}, force=True),
    "records": write_records,
}
OWN_WORDS = "no file|no dialog|found a directory"  # of places that said it already


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", READERS)
def test_what_is_read(place: object, tmp_path: Path, kind: str) -> None:
    read = READERS[str(place)]
    with pytest.raises(LlamaError, match=f"{KINDS[kind]}|{OWN_WORDS}"):
        read(put(tmp_path / "it", kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", WRITERS)
def test_what_is_written(place: str, tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / "it", kind)
    with pytest.raises(LlamaError, match=f"{KINDS[kind]}|{OWN_WORDS}"):
        WRITERS[place](path)
    left = [path.exists() for path in (path, path.with_name("out.part"))]
    assert any(left), "what was there is not replaced"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_in_an_adapter(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    put(tmp_path / name, kind)
    with pytest.raises(LlamaError, match=rf"{name} can't be read \({KINDS[kind]}\)"):
        read_adapter(tmp_path, ARGS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BESIDE[1:3])
def test_what_convert_copies(hf: Path, tmp_path: Path, name: str, kind: str) -> None:
    source = Path(shutil.copytree(hf, tmp_path / "ckpt"))
    put(source / name, kind)
    with pytest.raises(LlamaError, match=KINDS[kind]):
        convert(source, tmp_path / "out", "hf")


def test_a_chart_is_refused_before_hours_of_work(tmp_path: Path) -> None:
    path = put(tmp_path / "it.png", "pipe")
    with pytest.raises(LlamaError, match=r"it.png can't be written \(Is a pipe\): expected a file"):
        Chart(str(path), [])


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one\r\ntwo")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "one\ntwo"
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")


# --- no way round -----------------------------------------------------------------------------------------------------

OPENERS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "fdopen", "memmap"}  # of Python's
OTHERS = {"safe_open", "load_file", "torch.load", "numpy.load", "shutil.copyfile", "shutil.copy", "shutil.copy2"}
ALLOWED = {  # file: why it may open by itself
    "_util/files.py": "the one that looks",
    "_util/vocabulary_file.py": "blobfile's, after check_file",
    "_util/processes.py": "/proc",
    "accelerate/kernels/build.py": "files of this package, of the system, and of its own cache, which it checks",
    "accelerate/memory_pages.py": "/proc",
    "accelerate/shared_memory.py": "memory without a name",
    "bench/measure.py": "/proc",
    "bench/server_process.py": "/proc",
    "cli/program.py": "/dev/null",
}


def calls_of(function: ast.AST) -> list[tuple[str, str]]:
    """(the name that is called, with the name before its dot) of each call."""
    names = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names.append((node.func.id, node.func.id))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            names.append((node.func.attr, f"{owner}.{node.func.attr}"))
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "llama").rglob("*.py")), ids=lambda path: path.name)
def test_no_file_is_opened_without_a_look(path: Path) -> None:
    if str(path.relative_to(ROOT / "llama")) in ALLOWED:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    opened = [
        dotted for name, dotted in calls_of(tree) if name in OPENERS and dotted not in ("read_text", "read_bytes")
    ]
    assert opened == [], "use _util.files"
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        calls = [dotted for _, dotted in calls_of(function)]
        if {*calls} & OTHERS:
            assert {*calls} & {"check_file", "open_file"}, f"{function.name} calls {calls} without check_file"
