"""A server that is told to stop, or that loses a rank: as one process, on ranks of one model, and with copies."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from served import SECONDS_TO_DRAIN, Served, events, serving
from tiny import write_checkpoint

SECONDS_TO_TELL = 10  # that a client may wait, and a server run, after a rank was lost
RANKS, COPIES = ("--model_parallel_size", "2"), ("--model_parallel_size", "1")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), endless=True)


def ask(
    served: Served, tokens: int, path: str = "/v1/chat/completions", stream: bool = True, about: str = "all"
) -> Any:
    """(status, events or body) of an answer of so many tokens, and the seconds that it took."""
    body: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "stream": stream, "model": "tiny"}
    body |= {"prompt": about} if path == "/v1/completions" else {"messages": [{"role": "user", "content": about}]}
    with served.client() as client, client.stream("POST", path, json=body) as response:
        if not stream or response.status_code != 200:
            response.read()
            return response.status_code, response.json()
        return response.status_code, list(events(response))


def wait_for(found: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def is_draining(served: Served) -> bool:
    with served.client() as client:
        return client.get("/health").status_code == 503


@pytest.mark.parametrize(
    ("number", "options", "ranks"),
    [
        pytest.param(signal.SIGTERM, (), 0, id="one process"),
        pytest.param(signal.SIGINT, (), 0, id="one process, by Ctrl-C"),
        pytest.param(signal.SIGTERM, RANKS, 2, id="two ranks"),
        pytest.param(signal.SIGINT, RANKS, 2, id="two ranks, by Ctrl-C", marks=SLOW),
        pytest.param(signal.SIGTERM, COPIES, 2, id="two copies"),
        pytest.param(signal.SIGINT, COPIES, 2, id="two copies, by Ctrl-C", marks=SLOW),
    ],
)
def test_what_is_under_way_ends_and_nothing_new_is_taken(
    directory: Path, tmp_path: Path, number: int, options: tuple[str, ...], ranks: int
) -> None:
    with serving(directory, tmp_path / "log", "--model_name", "tiny", *options, ranks=ranks) as served:
        with ThreadPoolExecutor() as threads:
            asked = [threads.submit(ask, served, 600, about=about) for about in ("the sea", "a sky", "cats", "dogs")]
            served.wait_until_open(len(asked))
            served.process.send_signal(number)
            wait_for(lambda: is_draining(served), "it doesn't stop")
            status, body = ask(served, 5)
            assert (status, body["error"]["code"]) == (503, "shutting_down")
            for answer in asked:
                status, found = answer.result(SECONDS_TO_DRAIN)
                assert status == 200 and found[-1] == "[DONE]"
                assert found[-2]["choices"][0]["finish_reason"] == "length"
        said = served.end()
        assert "error:" not in said
        assert ranks or served.process.returncode == 0


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        pytest.param((), 0, id="one process"),
        pytest.param(RANKS, 2, id="two ranks", marks=SLOW),
        pytest.param(COPIES, 2, id="two copies"),
    ],
)
def test_a_second_signal_ends_it_at_once(directory: Path, tmp_path: Path, options: tuple[str, ...], ranks: int) -> None:
    with serving(directory, tmp_path / "log", "--model_name", "tiny", *options, ranks=ranks) as served:
        processes = {*served.ranks.values()}
        assert len(processes) == ranks
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(ask, served, 16000)
            served.wait_until_open(1)
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: is_draining(served), "it doesn't stop")
            served.process.send_signal(signal.SIGTERM)
            served.end(10)
            assert isinstance(asked.exception(10), httpx2.TransportError)
        wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in processes), "ranks are left", 10)


def has_error(answer: "Future[Any]") -> bool:
    """Whether a client was told of the loss in the form of its protocol, and of nothing that is inside."""
    status, found = answer.result(0)
    last = [event for event in found if event != "[DONE]"][-1] if isinstance(found, list) else found
    assert (status in (200, 503)) and (status == 200) == isinstance(found, list), found
    return "type" in last["error"] and "has ended" in last["error"]["message"] and "gloo" not in str(last)


@pytest.mark.parametrize(
    ("options", "ranks", "lost"),
    [
        pytest.param(RANKS, 2, 1, id="a rank"),
        pytest.param(COPIES, 2, 1, id="a copy"),
        pytest.param(RANKS, 4, 3, id="a rank of a copy", marks=SLOW),
    ],
)
def test_a_lost_rank_is_told_to_every_client(
    directory: Path, tmp_path: Path, options: tuple[str, ...], ranks: int, lost: int
) -> None:
    """Streamed or not, in each protocol, under way or waiting; and then all ranks end, and say which one was lost."""
    with serving(directory, tmp_path / "log", "--model_name", "tiny", *options, ranks=ranks) as served:
        processes = served.ranks
        kinds: list[dict[str, Any]] = [{}, {"stream": False}, {"path": "/v1/completions"}, {"path": "/v1/messages"}]
        kinds += [{"path": "/v1/messages", "stream": False}, {"path": "/v1/completions", "stream": False}]
        with ThreadPoolExecutor(20) as threads:
            asked = [
                threads.submit(ask, served, 16000, about=f"{i} is what", **kind)
                for i, kind in enumerate([*kinds, *kinds])
            ]
            served.wait_until_open(len(asked))
            time.sleep(0.5)
            killed = time.monotonic()
            os.kill(processes[lost], signal.SIGKILL)
            for answer in asked:
                assert answer.exception(SECONDS_TO_TELL - (time.monotonic() - killed)) is None
            assert all(has_error(answer) for answer in asked)
        said = served.end(SECONDS_TO_TELL)
        assert f"has lost rank {lost}, which has ended" in said, said
        assert not any(Path(f"/proc/{process}").exists() for process in processes.values())
