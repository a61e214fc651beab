"""Identity of a process across machines, containers and reboots, read from /proc: see proc(5).

On systems without it a process has no machine identity, and whether it is alive is unknown.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, for as long as it runs.

    Attributes:
        host: name of its host, for messages.
        machine: boot and process-id namespace in which `pid` is valid, "" where unknown.
        pid: process id.
        started: its start in clock ticks after boot, 0 where unknown.
    """

    host: str
    machine: str
    pid: int
    started: int


def this_process() -> Process:
    """Return the calling process."""
    pid = os.getpid()
    _, started = _stat(pid) or ("", 0)
    # JSON cannot hold the surrogates of a host name that is not UTF-8.
    host = socket.gethostname().encode(errors="replace").decode()
    return Process(host, _machine(), pid, started)


def is_alive(process: Process) -> bool | None:
    """Return whether a process still runs; None where this machine cannot know.

    A zombie, or another process with the same id, is not alive; a stopped process is.
    """
    if not process.machine or process.machine != _machine():
        return None
    found = _stat(process.pid)
    if found is not None:
        state, started = found
        return state not in "ZXx" and process.started in (0, started)
    try:
        # /proc may hide the processes of other users.
        os.kill(process.pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        # Containers of one host share its boot id, but have process ids of their own.
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """Return state and start of a process, None where /proc does not show it."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # proc(5): the name, in brackets, may contain spaces and brackets; fields 3, 4, ... follow.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[22 - 3])
