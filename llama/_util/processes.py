"""Processes of this machine, as Linux tells of them: whether one runs, has ended, or was stopped.

Knows process ids; knows no ranks. A process that has ended but that its parent hasn't asked for (a zombie) has ended.
"""

import os
from dataclasses import dataclass
from pathlib import Path

ENDED, STOPPED = frozenset("ZXx"), "T"  # letters of proc(5)
STATE, PARENT, SESSION, STARTED = 0, 1, 3, 19  # places of fields in a process's `stat`, after its name


@dataclass(frozen=True)
class Process:
    """One process, even if its id is given to another one later."""

    id: int
    started: str  # when, in ticks since the machine started

    def state(self) -> str:
        """The letter of proc(5): "T" for one that a signal stopped, "Z" for one that has ended, known or not."""
        fields = read_stat(self.id)
        return fields[STATE] if fields and fields[STARTED] == self.started else "Z"


def read_stat(process_id: int) -> list[str]:
    """What follows the name in a process's `stat`; [] where there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # a name may hold brackets and spaces


def has_ended(process_id: int) -> bool:
    """Whether there is no such process, or one that has ended."""
    fields = read_stat(process_id)
    return not fields or fields[STATE] in ENDED


def find_process(process_id: int) -> Process | None:
    """The process of this id; None where there is none, or no /proc."""
    fields = read_stat(process_id)
    return Process(process_id, fields[STARTED]) if fields else None


def find_launcher() -> Process | None:
    """The process that started this one in a session of its own, as torchrun does; None where there is no /proc.

    Scripts between the two are in this process's session.
    """
    fields = read_stat(os.getpid())
    session = fields[SESSION] if fields else ""
    while fields and fields[SESSION] == session:
        parent = int(fields[PARENT])
        fields = read_stat(parent)
    return Process(parent, fields[STARTED]) if fields else None


def find_children(process: Process) -> list[Process]:
    """The processes that this one started and that are there still."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        fields = read_stat(int(path.name))
        if fields and fields[PARENT] == str(process.id):
            found.append(Process(int(path.name), fields[STARTED]))
    return found


def read_environment(process: Process) -> dict[str, str]:
    """What a process was started with; {} where it can't be read."""
    try:
        entries = Path(f"/proc/{process.id}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def machine_name() -> str | None:
    """What processes that can see each other have in common: the machine's start and their pid namespace.

    None where there is no /proc.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return start + os.readlink("/proc/self/ns/pid")
    except (OSError, ValueError):
        return None
