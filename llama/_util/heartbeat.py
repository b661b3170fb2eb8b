"""Notices a rank or launcher that has ended, or a rank that was stopped, and ends this rank, so that none waits for it.

A thread beside the computing one does this. Of a rank of this machine it asks Linux whether it runs: such a rank may
compute as long as it likes, and needn't answer. Ranks of other machines send a byte every half second. A rank that ends
as it should says so first. Time in which this process is suspended itself doesn't count: a job that is suspended as a
whole goes on once it is resumed. Knows processes and sockets; knows no tensors and no model.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.util
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from .interrupt import flush_output
from .processes import (
    ENDED,
    STOPPED,
    Process,
    find_children,
    find_launcher,
    find_process,
    machine_name,
    read_environment,
)
from .ranks import env_rank

if sys.platform != "win32":
    import termios

INTERVAL = 0.5  # seconds between two looks
SECONDS_ENDED = 5  # after which a lost rank is told of: before, its error may be told, or the collective that it left
SECONDS_STOPPED = 5  # that a rank may be stopped: ranks that are suspended together don't stop at the same moment
SECONDS_SILENT = 60  # that a rank of another machine may be: it can't send while other code holds its interpreter
SECONDS_TO_CONNECT = 20
SECONDS_TO_TELL = 3  # whoever uses this rank that it ends
SECONDS_TO_FLUSH = 1
BEAT, GOODBYE = b".", b"!"
KEY_BYTES, RANK_BYTES = 16, 4


@dataclass
class Peer:
    """Another rank, as this one sees it."""

    rank: int
    process: Process | None  # None: on another machine, or on a system without /proc
    link: socket.socket
    has_left: bool = False  # said goodbye
    is_closed: bool = False  # the link
    ended: float = 0  # for how many seconds it has been seen so
    stopped: float = 0
    silent: float = 0

    def look(self, seconds: float) -> str | None:
        """What is wrong with it; None if nothing is. seconds: since the last look."""
        heard = self._receive()
        self.has_left = self.has_left or GOODBYE in heard
        if self.has_left:
            return None
        state = "" if self.process is None else self.process.state()
        self.ended = self.ended + seconds if self.has_ended else 0
        self.stopped = self.stopped + seconds if state == STOPPED else 0
        self.silent = 0 if heard or state else self.silent + seconds
        if self.ended > SECONDS_ENDED:
            return "which has ended"
        if self.stopped > SECONDS_STOPPED:
            return "which was stopped by a signal"
        return f"which was silent for {SECONDS_SILENT} s" if self.silent > SECONDS_SILENT else None

    @property
    def has_ended(self) -> bool:
        """Whether it has, without a goodbye."""
        return not self.has_left and (self.is_closed if self.process is None else self.process.state() in ENDED)

    def _receive(self) -> bytes:
        try:
            heard = self.link.recv(4096)
        except BlockingIOError:
            return b""
        except OSError:
            heard = b""
        self.is_closed = not heard
        return heard

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, or hasn't read for hours
            self.link.send(message)


class Heartbeat(threading.Thread):
    """Looks at the launcher, and once they are known at the other ranks, until this rank leaves or is alone."""

    def __init__(self, launcher: Process | None) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.launcher = launcher
        self.peers: list[Peer] = []
        self.rank = env_rank()[0]
        self.is_connected = False
        self.before_end: list[Callable[[str], None]] = []  # are told why, where this process is about to end
        self._process_id = os.getpid()
        self._terminal = read_terminal()
        self._is_over = threading.Event()
        self._seconds_stopped: float = 0  # for which there was such a rank, before the ranks knew each other
        self._stopped: list[Process] = []

    def run(self) -> None:
        before = time.monotonic()
        while not self._is_over.wait(INTERVAL):
            now = time.monotonic()
            seconds, before = min(now - before, 2 * INTERVAL), now  # less than passed if this process was suspended
            if self.is_connected and not dist.is_initialized():  # somebody left the process group
                self.leave()
            elif self.launcher is not None and self.launcher.state() in ENDED:
                self._end(f"its launcher (process {self.launcher.id}), which has ended")
            elif not self.is_connected:
                self._look_before_they_are_known(seconds)
            else:
                self._look_at_peers(seconds)

    def _look_before_they_are_known(self, seconds: float) -> None:
        """While ranks wait for each other to start: at torchrun's store, and at its ranks on this machine."""
        if is_store_gone():
            self._end("its launcher, which has ended")
        started = find_children(self.launcher) if self.launcher is not None and is_launched() else []
        stopped = [process for process in started if process.state() == STOPPED]
        self._seconds_stopped = self._seconds_stopped + seconds if stopped else 0
        if self._seconds_stopped > SECONDS_STOPPED:
            self._stopped = stopped
            rank = read_environment(stopped[0]).get("RANK", "?")
            self._end(f"rank {rank}, which was stopped by a signal")

    def _look_at_peers(self, seconds: float) -> None:
        for peer in list(self.peers):
            peer.send(BEAT)
            if wrong := peer.look(seconds):
                self._end(f"rank {peer.rank}, {wrong}")
            if peer.has_left:
                self.peers.remove(peer)

    @property
    def is_looking(self) -> bool:
        return not self._is_over.is_set()

    def leave(self) -> None:
        """Tell the others that this rank ends as it should, and look no longer."""
        if self._process_id != os.getpid() or self._is_over.is_set():  # a fork of this rank is none
            return
        self._is_over.set()
        for peer in self.peers:
            peer.send(GOODBYE)

    def _end(self, lost: str) -> None:
        """End this process. Its main thread may wait in a collective, so that no exception could reach it.

        A rank that is stopped can't end by itself, and would be left behind.
        """
        message = f"rank {self.rank} has lost {lost}"
        with contextlib.suppress(OSError):
            os.write(2, f"error: {message}\n".encode())
        for tell in self.before_end:
            in_time(tell, SECONDS_TO_TELL, message)
        restore_terminal(self._terminal)
        in_time(flush_output, SECONDS_TO_FLUSH)  # the main thread may hold the stream's lock
        for process in (*self._stopped, *(peer.process for peer in self.peers)):
            if process is not None and process.state() == STOPPED:
                with contextlib.suppress(OSError):
                    os.kill(process.id, signal.SIGKILL)
        os._exit(1)


def in_time(function: Callable[..., None], seconds: float, *arguments: str) -> None:
    """Call a function, and go on if it takes longer."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def read_terminal() -> list | None:
    """The settings of the terminal that is standard input, if it is one."""
    if sys.platform == "win32":
        return None
    try:
        return termios.tcgetattr(0)
    except termios.error:
        return None


def restore_terminal(settings: list | None) -> None:
    """Undo what a chat has set, such as that no keys are shown."""
    if sys.platform != "win32" and settings is not None:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, settings)


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_store_gone() -> bool:
    """Whether nobody listens where torchrun has its store, which is there before any rank is."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # then rank 0 has it, later
        return False
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 1):
            return False
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError):  # a network that is slow, or something else than torchrun
        return False


def find_heartbeat() -> Heartbeat | None:
    """This process's thread, if it runs."""
    threads = (thread for thread in threading.enumerate() if isinstance(thread, Heartbeat))
    return next((thread for thread in threads if thread.is_looking), None)


def name_lost_rank(patience: float = 0.0) -> str:
    """The rank that has ended and that others may wait for, as messages name it.

    patience: seconds to wait until it is seen; its connections are closed a little before its process is gone.
    """
    heartbeat = find_heartbeat()
    peers = heartbeat.peers if heartbeat is not None else []
    deadline = time.monotonic() + patience
    while not (ended := [peer.rank for peer in peers if peer.has_ended]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return f"rank {ended[0]}" if ended else "another rank"


def start_heartbeat() -> None:
    """Look at the launcher from now on, and at the other ranks, if there is a process group: then all ranks call this.

    Does nothing where nobody else is: in one process that no torchrun started.
    """
    heartbeat, is_grouped = find_heartbeat(), dist.is_initialized()
    has_peers = is_grouped and dist.get_world_size() > 1
    parent = multiprocessing.parent_process()
    if heartbeat is None and (has_peers or is_launched()):
        heartbeat = Heartbeat(find_launcher() if is_launched() else find_process(parent.pid or 0) if parent else None)
        heartbeat.start()
        atexit.register(leave_unless_failed, heartbeat)
        multiprocessing.util.Finalize(None, leave_unless_failed, (heartbeat,), exitpriority=1)  # of its processes
    if heartbeat is not None and is_grouped and not heartbeat.is_connected:
        heartbeat.rank = dist.get_rank()
        heartbeat.peers = connect() if has_peers else []
        heartbeat.is_connected = True


def leave_unless_failed(heartbeat: Heartbeat) -> None:
    """At the program's end. A rank that ends by an error says no goodbye, since others may wait for it."""
    if sys.exception() is None and getattr(sys, "last_value", None) is None:
        heartbeat.leave()


def stop_heartbeat() -> None:
    """Tell the others that this rank ends as it should."""
    if (heartbeat := find_heartbeat()) is not None:
        heartbeat.leave()


# --- connections ------------------------------------------------------------------------------------------------------


def connect() -> list[Peer]:
    """A connection to each of the other ranks that can be reached. Called on all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    machine, key = machine_name(), secrets.token_bytes(KEY_BYTES)  # the key tells ranks from strangers
    with listen() as listener:
        others: list = [None] * ranks
        dist.all_gather_object(others, (machine, find_process(os.getpid()), listener.getsockname(), key))
        links: dict[int, socket.socket] = {}
        for other in range(rank):
            with contextlib.suppress(OSError):  # a network that lets gloo through and nothing else
                links[other] = call(others[other][2], others[other][3], rank)
        links |= accept(listener, key, ranks - 1 - rank)
    peers = []
    for other, link in links.items():
        link.setblocking(False)
        is_near = machine is not None and others[other][0] == machine
        peers.append(Peer(other, others[other][1] if is_near else None, link))
    return peers


def listen() -> socket.socket:
    """A socket at this machine's address on the way to the place where ranks meet."""
    place = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "1")
    try:
        family, kind, _, _, address = socket.getaddrinfo(*place, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return socket.create_server((probe.getsockname()[0], 0), family=family)
    except OSError:
        return socket.create_server(("127.0.0.1", 0))


def call(address: tuple, key: bytes, rank: int) -> socket.socket:
    """A connection to the rank that listens at this address and has this key."""
    link = socket.create_connection(address[:2], SECONDS_TO_CONNECT)
    link.sendall(key + rank.to_bytes(RANK_BYTES))
    return link


def accept(listener: socket.socket, key: bytes, count: int) -> dict[int, socket.socket]:
    """The connections of so many other ranks, by their rank; fewer if they don't call in time."""
    links: dict[int, socket.socket] = {}
    end = time.monotonic() + SECONDS_TO_CONNECT
    while len(links) < count and (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError):
            link = listener.accept()[0]
            link.settimeout(left)
            said = link.recv(KEY_BYTES + RANK_BYTES, socket.MSG_WAITALL)
            if secrets.compare_digest(said[:KEY_BYTES], key):
                links[int.from_bytes(said[KEY_BYTES:])] = link
            else:
                link.close()
    return links
