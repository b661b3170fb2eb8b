"""What tests/_util/test_heartbeat.py runs on ranks, and as a program whose processes are killed and stopped.

python tests/heartbeat_program.py DIRECTORY (computing | waiting | starting) [fork | spawn]

Every rank writes its process id to DIRECTORY/pid.RANK, and then counts in DIRECTORY/count.RANK what it has done: sums
over all ranks, or, "waiting", nothing that others take part in. "starting": rank 1 never gets so far. With "fork" this
process starts two ranks, and never asks whether they have ended; with "spawn" multiprocessing starts them.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from llama import parallel
from llama._util import heartbeat
from llama.cli.program import errors_in_one_line


def begin(quick: bool = True) -> int:
    if quick:
        heartbeat.INTERVAL, heartbeat.SECONDS_ENDED, heartbeat.SECONDS_STOPPED = 0.05, 0.5, 0.5
    parallel.initialize(device="cpu")
    return dist.get_rank()


def add_up() -> None:
    dist.all_reduce(torch.ones(4))


def stop_one() -> None:
    """Rank 1 is stopped, and rank 0 waits for it."""
    if begin() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    add_up()


def stop_one_while_computing() -> None:
    """Rank 1 is stopped, and rank 0 does what takes long."""
    if begin() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def leave_early() -> str:
    """Rank 1 has nothing left to do; rank 0 has, for longer than a lost rank would be waited for."""
    if begin() == 0:
        time.sleep(2)
    return "done"


def hold_the_interpreter() -> float:
    """Rank 1 is in one call of C that lets no other thread of it run, and rank 0 waits for it."""
    if begin() == 1:
        ctypes.PyDLL(None).usleep(2_000_000)
    add_up()
    return 1.0


def end_as_stranger() -> None:
    """Rank 1 ends on another machine."""
    with_machines_of_their_own()
    if begin() == 1:
        os._exit(0)
    time.sleep(60)


def be_silent_as_stranger() -> None:
    """Rank 1 is stopped on another machine."""
    with_machines_of_their_own()
    heartbeat.SECONDS_SILENT = 1
    if begin() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    add_up()


def go_on_as_strangers() -> float:
    """Ranks of several machines compute for longer than one may be silent."""
    with_machines_of_their_own()
    heartbeat.SECONDS_SILENT = 0.5
    begin()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        time.sleep(0.05)
    add_up()
    return 1.0


def with_machines_of_their_own() -> None:
    heartbeat.machine_name = lambda: os.environ["RANK"]


def fork_and_go_on() -> str:
    """A child of rank 1 ends as programs do, and says no goodbye for its parent, which is stopped then."""
    if begin() == 1:
        if (child := os.fork()) == 0:
            heartbeat.find_heartbeat()
            parallel.stop_heartbeat()
            os._exit(0)
        os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
    return ""


def strangers_call() -> float:
    """Who connects without the key is no rank."""
    accept = heartbeat.accept

    def accept_after_a_stranger(listener: socket.socket, key: bytes, count: int) -> dict:
        strangers = [socket.create_connection(listener.getsockname()) for _ in range(2)]
        strangers[0].sendall(bytes(20))
        strangers[1].close()
        return accept(listener, key, count)

    heartbeat.accept = accept_after_a_stranger
    begin()
    add_up()
    found = heartbeat.find_heartbeat()
    assert found is not None
    return float(len(found.peers))


def work(directory: str, what: str) -> None:
    with errors_in_one_line():
        rank = int(os.environ["RANK"])
        Path(f"{directory}/pid.{rank}").write_text(str(os.getpid()))
        if what == "starting":
            Path(f"{directory}/count.{rank}").write_text("2")
            time.sleep(1000 * rank)
        begin(quick=False)
        count = 0
        while True:
            if what == "computing":
                add_up()
            count += 1
            Path(f"{directory}/count.{rank}").write_text(str(count))
            time.sleep(0.01)


def be_rank(rank: int, port: int, *arguments: str) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    work(*arguments)


def main(directory: str, what: str, start: str = "") -> None:
    if not start:
        work(directory, what)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for rank in range(2):
        if start == "spawn":
            multiprocessing.get_context("spawn").Process(target=be_rank, args=(rank, port, directory, what)).start()
        elif os.fork() == 0:
            be_rank(rank, port, directory, what)
    time.sleep(1000)


if __name__ == "__main__":
    main(*sys.argv[1:])
