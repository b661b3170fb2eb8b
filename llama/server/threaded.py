"""A server in a thread of this process, which goes on with something else, such as asking it.

Knows uvicorn; knows no endpoint.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from .app import make_app
from .service import Service

SECONDS_TO_STOP = 30


@contextlib.contextmanager
def serve_in_thread(service: Service, listener: socket.socket) -> Iterator[None]:
    """In this context clients are answered."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None, access_log=False))
    with service.llama.engine.serve():
        thread = threading.Thread(target=server.run, args=([listener],), name="llama-server")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield
        finally:
            server.should_exit = True
            thread.join(SECONDS_TO_STOP)
