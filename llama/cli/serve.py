"""`python -m llama serve`: its options, and the process that answers OpenAI's clients until it is told to stop."""

import argparse
import contextlib
import logging
import socket
from pathlib import Path

from .._util.console import print_note
from .._util.packages import install_command
from .._util.ranks import is_main_process
from ..errors import LlamaError
from ..parallel import raise_together
from .model_options import INTEGER, NUMBER, add_model_options, build_model, read_settings, recommend_settings
from .program import checkpoint_or_demo

ADDRESS, PORT = "127.0.0.1", 8000
NEEDED = ("fastapi", "uvicorn", "prometheus-client", "httpx2")  # packages of the extra `serve`
API_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}  # of a request to a model whose files recommend nothing
SEED = "for requests that have none: the same ones in the same order get the same texts after a start (default: 1)"


def add_options(command: argparse.ArgumentParser) -> None:
    command.epilog = "For example: python -m llama serve --ckpt_dir DIR --max_seq_len 8192 --max_batch_size 8"
    add = command.add_argument_group("server").add_argument
    add("--host", default=ADDRESS, help=f"address to listen at (default: {ADDRESS}, which other machines can't reach)")
    add("--port", **INTEGER, default=PORT, help=f"port to listen at; 0 takes a free one (default: {PORT})")
    add("--model_name", metavar="NAME", help="what clients call the model (default: the name of its directory)")
    add("--api_key", metavar="KEY", help="that clients have to send (default: none is asked for)")
    add("--cors_origin", metavar="ORIGIN", help="whose pages in browsers may send requests (default: no one's)")
    add("--max_batch_size", **INTEGER, default=8, help="answers that are computed at a time (default: 8)")
    add("--max_queue", **INTEGER, default=256, help="answers that may wait or be under way (default: 256)")
    groups = "ranks that share a copy of the model; each such group has one (default: all ranks share one)"
    add("--model_parallel_size", **INTEGER, help=groups)
    add("--timeout", **NUMBER, default=600.0, help="seconds that an answer may take (default: 600)")
    add_model_options(command, {**API_DEFAULTS, "seed": SEED})
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    try:
        from ..server.ranks import serve
        from ..server.service import ServerOptions, Service
    except ModuleNotFoundError as e:
        raise LlamaError(f"serve needs {e.name}, which is not installed: run {install_command(*NEEDED)}") from e
    settings = read_settings(options, {**API_DEFAULTS, **recommend_settings(options)})
    with raise_together():  # before the model is loaded, which may take long
        listener = listen(options.host, options.port) if is_main_process() else None
    llama = build_model(options, options.max_batch_size, options.model_parallel_size)
    directory = Path(checkpoint_or_demo(options.ckpt_dir, options.adapter_dir)).resolve()
    server_options = ServerOptions(
        model=options.model_name or ("demo" if options.ckpt_dir is None else directory.name),
        defaults={name: value for name, value in settings.items() if value not in (None, ())},
        api_key=options.api_key,
        cors_origin=options.cors_origin,
        max_queue=options.max_queue,
        timeout=options.timeout,
    )
    if is_main_process():  # the other ranks log nothing
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with listener or contextlib.nullcontext():

        def say(copies: int) -> None:
            assert listener is not None
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            several = f", {copies} copies" if copies > 1 else ""
            print_note(f"serving {server_options.model} at http://{shown}:{port}/v1{several} (Ctrl-C ends)")

        serve(Service(llama, server_options), listener, say)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises LlamaError where there can't be one."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as e:
        raise LlamaError(f"{host}, port {port}, can't be listened at ({e}): give another --host or --port") from e
