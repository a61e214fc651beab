"""Content of a lease file: who owns a folder, and by which right.

A process is identified across machines, containers and reboots by Linux's /proc, see proc(5). On
other systems it has no machine identity, and whether it is alive is unknown.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter

# All records have the same length, so that a file can be rewritten in place.
_LENGTH = 1024
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


def seconds() -> float:
    """Return a clock's seconds; where the system has such a clock, it includes suspended time."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@dataclass(frozen=True)
class Pace:
    """How often an owner renews its lease, and when a lease is stale.

    Attributes:
        renew_s: seconds between two renewals.
        stale_s: seconds without a change of the counter after which a watching process takes over.
    """

    renew_s: float = 3.0
    stale_s: float = 20.0


@dataclass(frozen=True)
class Ticket:
    """The right to take a folder over from the process that holds the same ticket.

    Attributes:
        run: unique to the run that a command or a search has started.
        starter: the process whose end also ends the run, or None.
    """

    run: str
    starter: Process | None = None

    @classmethod
    def of_this_process(cls) -> Ticket:
        """Return a new ticket for a run that ends with this process."""
        return cls(uuid4().hex, this_process())

    def detached(self) -> Ticket:
        """Return the same ticket for a run that continues without its starter."""
        return Ticket(self.run)


@dataclass(frozen=True)
class Record:
    """Content of a lease file.

    Attributes:
        token: unique to the lease.
        run: of the ticket.
        owner: the process that writes to the folder.
        starter: of the ticket.
        since: local time on the owner's host, for messages.
        counter: number of renewals.
    """

    token: str
    run: str
    owner: Process
    starter: Process | None
    since: str
    counter: int = 0

    @classmethod
    def new(cls, ticket: Ticket) -> Record:
        """Return the record of a lease that this process takes now."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(uuid4().hex, ticket.run, this_process(), ticket.starter, since)

    @classmethod
    def read(cls, content: bytes) -> Record | None:
        """Parse a file's content; None where it is half written or of another version."""
        try:
            return _RECORDS.validate_json(content)
        except ValueError:
            return None

    def content(self) -> bytes:
        """Return the file's content, 1024 bytes."""
        return _RECORDS.dump_json(self).ljust(_LENGTH - 1) + b"\n"


_RECORDS = TypeAdapter(Record)


def owner_text(record: Record | None) -> str:
    """Return the owner that a record names, for messages."""
    if record is None:
        return "an unknown process (its lease file is empty, half written or of another version)"
    return f"process {record.owner.pid} on host {record.owner.host} since {record.since}"
