"""Content of a lease file, and the times that a lease goes by. Source: this project."""

from __future__ import annotations

import time
from dataclasses import dataclass
from uuid import uuid4

from pydantic import TypeAdapter

from rayfed_lora.runs.leases.processes import Process, this_process

# All records have the same length, so that a file can be rewritten in place.
_LENGTH = 1024


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
