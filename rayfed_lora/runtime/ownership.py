"""One writer a run folder: a lease that its owner renews and that only a dead owner loses.

The lease is the folder's newest lease file. Its owner rewrites it every few seconds with a higher
counter. A taker creates the file of the next number, which exactly one of several can, and removes
the one before; the former owner misses its file at its next look and writes no more. A lease is
stale once its counter stands still while a taker watches: clocks are not compared.

Source: this project.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from uuid import uuid4

from rayfed_lora.errors import InterruptedRunError, RunError, RunFolderError
from rayfed_lora.runtime.lease_files import (
    NO_CONDITIONS,
    LeaseFiles,
    NoConditionalWritesError,
    PlainFiles,
    lease_files,
)
from rayfed_lora.runtime.processes import Process, is_alive, this_process
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
class _Record:
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
        return json.dumps(asdict(self)).encode().ljust(_LENGTH - 1) + b"\n"

    @classmethod
    def read(cls, content: bytes) -> _Record | None:
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
        owner = self.owner
        return f"process {owner.pid} on host {owner.host} since {self.since}"


def _who(record: _Record | None) -> str:
    return "a process that does not tell its name" if record is None else record.who


def _seconds() -> float:
    """Return seconds that count on while the machine sleeps, where it can tell."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Lease:
    """A folder that this process owns until `release`; a thread renews the lease."""

    def __init__(
        self, folder: RunFolder, files: LeaseFiles, number: int, record: _Record, pace: Pace
    ) -> None:
        """Keep what `take` has created, and start to renew it."""
        self._location = folder.location
        self._files = files
        self._number = number
        self._record = record
        self._content = record.content()
        self._pace = pace
        self._lost: str | None = None
        self._renewed = self._seen = _seconds()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._renew_often, name="lease", daemon=True).start()

    @property
    def ticket(self) -> Ticket:
        """The right to take the folder over from this process."""
        return Ticket(self._record.run, self._record.starter)

    @property
    def note(self) -> str | None:
        """What the user should know of the folder's storage, or None."""
        return self._files.note

    @property
    def lost(self) -> bool:
        """Whether this process is known to have lost the folder; asks nobody."""
        return self._lost is not None

    def or_lost(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return what tells a round loop to stop: as before, or once the folder is lost."""
        return lambda: self.lost or should_stop()

    def check(self) -> None:
        """Check that this process still owns the folder: called before each write.

        Raises:
            RunError: another process owns it, or the lease could not be renewed for too long.
        """
        with self._lock:
            if self._lost is None and _seconds() - self._renewed > self._pace.stale_s / 2:
                # This process was stopped or asleep, or the storage was: another one may be about
                # to take the folder. It sees the counter move, or is done after a moment.
                self._renew()
                time.sleep(self._pace.renew_s / 3)
                self._seen = float("-inf")
            if self._lost is None:
                self._look()
            if self._lost is not None:
                raise RunError(f"run folder {self._location}: {self._lost}; nothing more is saved")

    def release(self) -> None:
        """Stop renewing and let the folder go, where it is still owned."""
        self._ended.set()
        with self._lock, suppress(OSError):
            content = self._files.read(self._number)
            if content is not None and self._is_mine(content):
                self._files.remove(self._number)
            self._files.tidy()

    def keep(self) -> None:
        """Stop renewing, and leave the lease to a process with the same ticket."""
        self._ended.set()

    def handed_over(self) -> bool:
        """Return whether another process has taken the folder."""
        with self._lock, suppress(OSError):
            return self._files.read(self._number) is None
        return False

    def _renew_often(self) -> None:
        while not self._ended.wait(self._pace.renew_s):
            with self._lock:
                if not self._ended.is_set() and self._lost is None:
                    self._renew()

    def _renew(self) -> None:
        starter = self._record.starter
        if starter is not None and is_alive(starter) is False:
            self._lost = f"the command that started this run ({starter.pid}) is gone"
            return
        record = replace(self._record, counter=self._record.counter + 1)
        try:
            if self._files.rewrite(self._number, self._content, record.content()):
                self._record, self._content = record, record.content()
                self._renewed = self._seen = _seconds()
            else:
                # It may be a write whose answer was lost.
                self._read()
        except OSError as error:
            self._age(error)

    def _look(self) -> None:
        starter = self._record.starter
        if starter is not None and is_alive(starter) is False:
            self._lost = f"the command that started this run ({starter.pid}) is gone"
        elif not self._files.remote or _seconds() - self._seen > self._pace.renew_s / 3:
            try:
                self._read()
            except OSError as error:
                self._age(error)

    def _read(self) -> None:
        content = self._files.read(self._number)
        if content is not None and self._is_mine(content):
            self._content, self._seen = content, _seconds()
            self._record = _Record.read(content) or self._record
        else:
            self._lost = self._taken()

    def _age(self, error: OSError) -> None:
        unknown_s = _seconds() - max(self._renewed, self._seen)
        if unknown_s > self._pace.stale_s:
            self._lost = (
                f"its lease could not be renewed for {unknown_s:.0f} s, and another process may"
                f" have taken it ({error})"
            )

    def _is_mine(self, content: bytes) -> bool:
        found = _Record.read(content)
        return found is not None and found.token == self._record.token

    def _taken(self) -> str:
        with suppress(OSError):
            numbers = self._files.numbers()
            content = self._files.read(numbers[-1]) if numbers else None
            if content is not None:
                return f"this process has lost it to {_who(_Record.read(content))}"
        return "this process has lost it to another one, or its lease file was removed"


def owner_of(folder: RunFolder) -> str | None:
    """Return who owns a folder, for people; None where nobody does or the owner is dead."""
    with suppress(OSError):
        files = lease_files(folder)
        for number in files.numbers()[-1:]:
            content = files.read(number)
            record = None if content is None else _Record.read(content)
            if record is not None and is_alive(record.owner) is not False:
                return record.who
    return None


def take(
    folder: RunFolder,
    ticket: Ticket | None = None,
    *,
    wait: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    pace: Pace | None = None,
) -> Lease:
    """Make this process the owner of a run folder.

    A folder without an owner, with one that is dead on this machine, or with one of the same
    ticket is taken at once.

    Args:
        folder: the run folder; made where it is not there.
        ticket: of the run; default a new one.
        wait: watch the lease of another owner, and take the folder once the counter stands still.
        tell: called with a line before such a wait.
        pace: of lease and wait; default `PACE`.

    Raises:
        RunFolderError: another process owns the folder, or it cannot be read or written.
    """
    pace = pace or PACE
    ticket = ticket or Ticket(uuid4().hex)
    try:
        files = lease_files(folder)
        try:
            return _take(folder, files, ticket, _Watch(folder, pace, wait, tell))
        except NoConditionalWritesError:
            files = PlainFiles(folder, NO_CONDITIONS)
            return _take(folder, files, ticket, _Watch(folder, pace, wait, tell))
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder.location}: expected a folder that can be read and written; {error}"
        ) from error


def _take(folder: RunFolder, files: LeaseFiles, ticket: Ticket, watch: _Watch) -> Lease:
    while True:
        numbers = files.numbers()
        before = files.read(numbers[-1]) if numbers else None
        if numbers and before is None:
            continue  # released between the two looks
        if before is not None:
            record = _Record.read(before)
            right = record is not None and record.run == ticket.run
            dead = record is not None and is_alive(record.owner) is False
            if not (right or dead or watch.is_stale(numbers[-1], before, record)):
                continue
        lease = _create(folder, files, ticket, watch.pace, numbers, before)
        if lease is not None:
            return lease
        # Another process was quicker.
        time.sleep(random.uniform(0.0, watch.pace.renew_s / 10))


def _create(
    folder: RunFolder,
    files: LeaseFiles,
    ticket: Ticket,
    pace: Pace,
    numbers: list[int],
    before: bytes | None,
) -> Lease | None:
    """Create the next lease file, and remove those before; None where another process has."""
    record = _Record(
        token=uuid4().hex,
        run=ticket.run,
        owner=this_process(),
        starter=ticket.starter,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    number = numbers[-1] + 1 if numbers else 1
    if not files.create(number, record.content()):
        return None
    # A process that was asleep since its look may create a number that is in use no more.
    others = {*files.numbers()} - {number}
    if not others <= {*numbers} or not _cleared(files, ticket, numbers, before):
        files.remove(number)
        return None
    return Lease(folder, files, number, record, pace)


def _cleared(files: LeaseFiles, ticket: Ticket, numbers: list[int], before: bytes | None) -> bool:
    """Remove earlier lease files; return False where the newest is not what was judged."""
    for number in reversed(numbers):
        while (now := files.read(number)) is not None:
            found = _Record.read(now)
            right = found is not None and found.run == ticket.run
            if number == numbers[-1] and now != before and not right:
                return False
            files.remove(number)
    return True


class _Watch:
    """Watches the lease of another owner until it is stale."""

    def __init__(
        self, folder: RunFolder, pace: Pace, wait: bool, tell: Callable[[str], None]
    ) -> None:
        self.pace = pace
        self._location = folder.location
        self._wait = wait
        self._tell = tell
        self._seen: tuple[int, bytes] | None = None
        self._still_s = self._total_s = 0.0
        self._at = _seconds()

    def is_stale(self, number: int, content: bytes, record: _Record | None) -> bool:
        """Look at the lease and wait a moment; call again where it returns False.

        Raises:
            RunFolderError: the owner is alive, or there is to be no wait.
        """
        step_s = self.pace.renew_s / 6
        now = _seconds()
        # No more than a few steps: this process may have been asleep itself.
        passed_s, self._at = min(now - self._at, 3 * step_s), now
        if not self._wait:
            raise RunFolderError(self._refusal(record))
        if self._seen is None:
            self._tell(
                f"run folder {self._location} is owned by {_who(record)}; waiting up to"
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

    def _refusal(self, record: _Record | None) -> str:
        return (
            f"run folder {self._location} is owned by {_who(record)}, whose run goes on: end that"
            " one first, or choose another --out"
            + ("" if self._wait else "; where it was killed, --resume takes the folder over")
        )


@contextmanager
def owned(
    folder: RunFolder,
    ticket: Ticket | None = None,
    *,
    wait: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[RunFolder, Lease]]:
    """Own a folder as long as the block runs; arguments and errors as for `take`.

    Yields:
        The folder, which checks the lease before it changes a file, and the lease.

    Raises:
        RunError: the folder was lost.
    """
    lease = take(folder, ticket, wait=wait, tell=tell)
    try:
        yield folder.guarded(lease.check), lease
    except InterruptedRunError:
        if lease.lost:
            # It was not the user that stopped the run.
            lease.check()
        raise
    finally:
        lease.release()
