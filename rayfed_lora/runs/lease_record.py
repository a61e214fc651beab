"""What a lease file says, and how another process judges it. Source: this project."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from uuid import uuid4

from rayfed_lora.errors import RunFolderError
from rayfed_lora.runs.processes import Process, is_alive, this_process
from rayfed_lora.storage import RunFolder

# A file that is rewritten in place keeps its length.
_LENGTH = 1024


@dataclass(frozen=True)
class Pace:
    """How often an owner renews its lease, and when a lease is stale.

    Attributes:
        renew_s: seconds between two renewals.
        stale_s: seconds that the counter stands still before another process takes the folder.
    """

    renew_s: float = 3.0
    stale_s: float = 20.0


PACE = Pace()


@dataclass(frozen=True)
class Ticket:
    """The right to take a folder over from whichever process has the same one.

    Attributes:
        run: unique to the run that a command or a search has started.
        starter: the process without which the run is to end, or None.
    """

    run: str
    starter: Process | None = None

    @classmethod
    def of_this_process(cls) -> Ticket:
        """Return a new one for a run that is to end with this process."""
        return cls(uuid4().hex, this_process())

    def detached(self) -> Ticket:
        """Return the same one for a run that goes on without its starter."""
        return Ticket(self.run)


@dataclass(frozen=True)
class Record:
    """Content of a lease file.

    Attributes:
        token: unique to the lease.
        run: of the ticket.
        owner: the process that writes the folder.
        starter: of the ticket.
        since: local time of the owner's host, for people.
        counter: number of renewals.
    """

    token: str
    run: str
    owner: Process
    starter: Process | None
    since: str
    counter: int = 0

    def content(self) -> bytes:
        """Return the file's content; its length is always the same."""
        return json.dumps(asdict(self)).encode().ljust(_LENGTH - 1) + b"\n"

    @classmethod
    def read(cls, content: bytes) -> Record | None:
        """Return what `content` gave, None where it is being written or of another version."""
        try:
            found = json.loads(content)
            owner, starter = found.pop("owner"), found.pop("starter")
            known = None if starter is None else Process(**starter)
            return cls(owner=Process(**owner), starter=known, **found)
        except (ValueError, TypeError, LookupError, AttributeError):
            return None

    @property
    def who(self) -> str:
        """The owner, for people."""
        owner = self.owner
        return f"process {owner.pid} on host {owner.host} since {self.since}"


def who_is(record: Record | None) -> str:
    """Return the owner that a record names, for people."""
    if record is None:
        return "an unknown process (its lease file is empty, half written or of another version)"
    return record.who


def seconds() -> float:
    """Return seconds that count on while the machine sleeps, where it can tell."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Watch:
    """Watches the lease of another owner until it is stale."""

    def __init__(
        self, folder: RunFolder, pace: Pace, wait: bool, tell: Callable[[str], None]
    ) -> None:
        """Start; arguments as for `take`."""
        self.pace = pace
        self._location = folder.location
        self._wait = wait
        self._tell = tell
        self._seen: tuple[int, bytes] | None = None
        self._still_s = self._total_s = 0.0
        self._at = seconds()

    def is_stale(self, number: int, content: bytes, record: Record | None) -> bool:
        """Look at the lease and wait a moment; call again where it returns False.

        Raises:
            RunFolderError: the owner is alive, or there is to be no wait.
        """
        step_s = self.pace.renew_s / 6
        now = seconds()
        # No more than a few steps: this process may have been asleep itself.
        passed_s, self._at = min(now - self._at, 3 * step_s), now
        if not self._wait:
            raise RunFolderError(self._refusal(record))
        if self._seen is None:
            self._tell(
                f"run folder {self._location} is owned by {who_is(record)}; waiting up to"
                f" {self.pace.stale_s:.0f} s to see whether it is still alive"
            )
        elif self._seen == (number, content):
            self._still_s += passed_s
            self._total_s += passed_s
        else:
            self._still_s = 0.0
            self._total_s += passed_s
            # The command was killed, and what it had started follows it within seconds.
            orphan = (
                record is not None
                and record.starter is not None
                and is_alive(record.starter) is False
            )
            if not orphan or self._total_s > 2 * self.pace.stale_s:
                raise RunFolderError(self._refusal(record))
        self._seen = number, content
        if self._still_s >= self.pace.stale_s:
            return True
        time.sleep(step_s)
        return False

    def _refusal(self, record: Record | None) -> str:
        return (
            f"run folder {self._location} is owned by {who_is(record)}, whose run goes on: end that"
            " one first, or choose another --out"
            + ("" if self._wait else "; where it was killed, --resume takes the folder over")
        )
