"""One writer a run folder: a lease that its owner renews and that only a dead owner loses.

The lease is the folder's newest lease file. Its owner rewrites it every few seconds with a higher
counter. A taker creates the file of the next number, which exactly one of several can, and removes
the one before; the former owner misses its file at its next look and writes no more. A lease is
stale once its counter stands still while a taker watches: clocks are not compared.

Source: this project.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from uuid import uuid4

from rayfed_lora.errors import InterruptedRunError, RunError, RunFolderError
from rayfed_lora.runs.lease_files import (
    NO_CONDITIONS,
    LeaseFiles,
    NoConditionalWritesError,
    PlainFiles,
    file_name,
    lease_files,
)
from rayfed_lora.runs.lease_record import PACE, Pace, Record, Ticket, Watch, seconds, who_is
from rayfed_lora.runs.processes import is_alive, this_process
from rayfed_lora.storage import RunFolder

__all__ = ["PACE", "Lease", "Pace", "Ticket", "owned", "owner_of", "take"]


class Lease:
    """A folder that this process owns until `release`; a thread renews the lease."""

    def __init__(
        self, folder: RunFolder, files: LeaseFiles, number: int, record: Record, pace: Pace
    ) -> None:
        """Keep what `take` has created, and start to renew it."""
        self._location = folder.location
        self._files = files
        self._number = number
        self._record = record
        self._content = record.content()
        self._pace = pace
        self._lost: str | None = None
        self._kept = False
        self._renewed = self._seen = seconds()
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
            RunError: another process owns it, or the lease cannot be read.
        """
        with self._lock:
            began = seconds()
            while self._lost is None:
                try:
                    self._look()
                    break
                except OSError as error:
                    if seconds() - began > self._pace.stale_s:
                        raise RunError(
                            f"run folder {self._location}: its lease cannot be read ({error});"
                            " nothing more is saved"
                        ) from error
                time.sleep(self._pace.renew_s / 3)
            if self._lost is not None:
                raise RunError(f"run folder {self._location}: {self._lost}; nothing more is saved")

    def release(self) -> None:
        """Stop renewing and let the folder go, where it is still owned; not after `keep`."""
        self._ended.set()
        if self._kept:
            return
        with self._lock, suppress(OSError):
            content = self._files.read(self._number)
            if content is not None and self._is_mine(content):
                self._files.remove(self._number)
            self._files.tidy()

    def keep(self) -> None:
        """Stop renewing, and leave the lease to a process with the same ticket."""
        self._ended.set()
        self._kept = True

    def handed_over(self) -> bool:
        """Return whether another process has taken the folder."""
        with self._lock, suppress(OSError):
            return self._files.read(self._number) is None
        return False

    def _renew_often(self) -> None:
        while not self._ended.wait(self._pace.renew_s):
            # What storage answers later decides: a failure says nothing of the owner.
            with self._lock, suppress(OSError):
                if not self._ended.is_set() and self._lost is None and not self._is_orphan():
                    self._renew()

    def _is_orphan(self) -> bool:
        """Give the folder up, and return True, where the command that started the run is gone."""
        starter = self._record.starter
        if starter is None or is_alive(starter) is not False:
            return False
        self._lost = f"the command that started this run ({starter.pid}) is gone"
        return True

    def _renew(self) -> None:
        record = replace(self._record, counter=self._record.counter + 1)
        if self._files.rewrite(self._number, self._content, record.content()):
            self._record, self._content = record, record.content()
            self._renewed = self._seen = seconds()
        else:
            # It may be a write whose answer was lost.
            self._read()

    def _look(self) -> None:
        """See whether the folder is still owned.

        Raises:
            OSError: that cannot be read, and another process may have taken it.
        """
        if self._is_orphan():
            return
        now = seconds()
        if now - self._renewed > self._pace.stale_s / 2:
            # This process was stopped or asleep, or the storage was: another one may be about to
            # take the folder. It sees the counter move, or is done after a moment.
            self._renew()
            time.sleep(self._pace.renew_s / 3)
            self._read()
        elif not self._files.remote or now - self._seen > self._pace.renew_s / 3:
            # A lease that was renewed not long ago is nobody else's yet.
            with suppress(OSError):
                self._read()

    def _read(self) -> None:
        content = self._files.read(self._number)
        if content is not None and self._is_mine(content):
            self._content, self._seen = content, seconds()
            self._record = Record.read(content) or self._record
        else:
            self._lost = self._taken()

    def _is_mine(self, content: bytes) -> bool:
        found = Record.read(content)
        return found is not None and found.token == self._record.token

    def _taken(self) -> str:
        with suppress(OSError):
            numbers = self._files.numbers()
            content = self._files.read(numbers[-1]) if numbers else None
            if content is not None:
                return f"this process has lost it to {who_is(Record.read(content))}"
        return "this process has lost it to another one, or its lease file was removed"


def owner_of(folder: RunFolder) -> str | None:
    """Return who owns a folder, for people; None where nobody does or the owner is dead."""
    with suppress(OSError):
        files = lease_files(folder)
        for number in files.numbers()[-1:]:
            content = files.read(number)
            record = None if content is None else Record.read(content)
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
            return _take(folder, files, ticket, Watch(folder, pace, wait, tell))
        except NoConditionalWritesError:
            files = PlainFiles(folder, NO_CONDITIONS)
            return _take(folder, files, ticket, Watch(folder, pace, wait, tell))
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder.location}: expected a folder that can be read and written; {error}"
        ) from error


def _take(folder: RunFolder, files: LeaseFiles, ticket: Ticket, watch: Watch) -> Lease:
    began = seconds()
    while True:
        numbers = files.numbers()
        before = files.read(numbers[-1]) if numbers else None
        if numbers and before is None:
            # Released between the two looks.
            if seconds() - began > watch.pace.stale_s:
                raise OSError(f"{file_name(numbers[-1])} is listed, but is not there")
            time.sleep(watch.pace.renew_s / 6)
            continue
        if before is not None:
            began = seconds()
            record = Record.read(before)
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
    record = Record(
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
            found = Record.read(now)
            right = found is not None and found.run == ticket.run
            if number == numbers[-1] and now != before and not right:
                return False
            files.remove(number)
    return True


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
