"""What each process does where several serve: the first listens to clients, and the others follow it, or serve it.

The first rank of each model-parallel group has a copy of the model. Knows ranks and servers; knows no request.
"""

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch.distributed as dist
import uvicorn
from starlette.types import ASGIApp

from .. import parallel
from .._util.heartbeat import listen as listen_for_ranks
from ..engine.rank_groups import leaders_group
from .app import make_app
from .copies import Copies
from .queue import Queue
from .relay import Relay
from .router import Router
from .service import Service
from .stopping import DrainingServer, Failure

SECONDS_IDLE = 60  # that a connection between copies is kept: longer than the side that sends keeps it
KEY_BYTES = 32


@dataclass(frozen=True)
class Place:
    """Where a copy answers the first one, and the key that it asks for."""

    url: str
    key: str


def serve(service: Service, listener: socket.socket | None, say: Callable[[int], None]) -> None:
    """Serve until the process is told to stop. All ranks call it. listener: where clients connect, on the first rank.

    say: called on the first rank with the number of copies, once they answer.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the log has its own line of each request
    with leaders_group() as leaders:
        if listener is not None:
            serve_clients(service, listener, leaders, say)
            return
        with signals_ignored():  # the first rank hears them too, and says when it is over
            if parallel.is_group_leader():
                serve_first_rank(service, leaders)
            else:
                service.llama.engine.follow()


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def serve_clients(
    service: Service, listener: socket.socket, leaders: dist.ProcessGroup | None, say: Callable[[int], None]
) -> None:
    """What the first rank does: it answers clients, itself or by other copies, and in the end tells these to end."""
    failure, queue = Failure(), service.queue
    copies: Callable[[ASGIApp], ASGIApp] | None = None
    with service.llama.engine.serve(), failure.noticed():
        count = 1
        if leaders is not None:
            places = meet(None, leaders)
            count, queue = len(places), Queue(service.options.max_queue)
            relays = {i: Relay(f"copy {i}", place.url, place.key) for i, place in enumerate(places) if place}
            router = Router[int](max(service.llama.model.params.max_batch_size // 2, 1))
            copies = partial(Copies, relays=relays, router=router, queue=queue, metrics=service.metrics)
        say(count)
        app = make_app(service, failure, copies)
        DrainingServer(configure(app), queue).run(sockets=[listener])
    if leaders is not None:
        parallel.broadcast_object("end", leaders)


def serve_first_rank(service: Service, leaders: dist.ProcessGroup | None) -> None:
    """What the first rank of another group does: it answers what the first rank passes on, until that one says so."""
    assert leaders is not None
    key, failure = secrets.token_hex(KEY_BYTES), Failure()
    service.options = replace(service.options, api_key=key, cors_origin=None)
    with listen_for_ranks() as listener, service.llama.engine.serve(), failure.noticed():
        host, port = listener.getsockname()[:2]
        config = configure(make_app(service, failure))
        config.timeout_keep_alive = SECONDS_IDLE
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), name="llama-copy", daemon=True)
        thread.start()
        meet(Place(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", key), leaders)
        parallel.broadcast_object(None, leaders)
        server.should_exit = server.force_exit = True
        thread.join()


def configure(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, lifespan="off")


def meet(own: Place | None, leaders: dist.ProcessGroup) -> list[Place | None]:
    """The places of all copies. Each calls it with its own."""
    places: list[Place | None] = [None] * leaders.size()
    dist.all_gather_object(places, own, group=leaders)
    return places
