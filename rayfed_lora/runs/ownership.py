"""One writer per run folder: a lease that its owner renews and that only a dead owner loses.

The lease is the lease file with the highest number. Its owner rewrites it every few seconds with a
higher counter. To take the folder over, a process creates the file of the next number, which only
one of several processes can do, and removes the previous one. The former owner finds its file
missing at its next check and writes nothing more. A lease is stale once its counter has not changed
for a while; clocks of different machines are not compared.

Source: this project; Amazon S3 User Guide, "Conditional requests".
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from uuid import uuid4

from pyarrow import fs

from rayfed_lora.errors import InterruptedRunError, RunFolderError
from rayfed_lora.runs.leases.lease import Lease, LeaseFiles
from rayfed_lora.runs.leases.lease_files import MountedFiles, PlainFiles, file_name, numbers_in
from rayfed_lora.runs.leases.record import Pace, Record, Ticket, is_alive, owner_text, seconds
from rayfed_lora.runs.leases.s3_files import NoConditionalWritesError, S3Files
from rayfed_lora.storage import RunFolder

__all__ = ["PACE", "Lease", "Pace", "Ticket", "lease_files", "owned", "owner_of", "take"]

PACE = Pace()
_UNNOTICED = (
    "two runs that are started into one s3:// folder at the same moment may not notice each other"
)
_NO_BOTO3 = f"boto3 is not installed (pip install 'rayfed-lora[aws]'): {_UNNOTICED}"
_NO_CONDITIONS = f"the object store has no conditional writes: {_UNNOTICED}"


def lease_files(folder: RunFolder) -> LeaseFiles:
    """Return the lease files of a folder, in the safest way that its storage supports."""
    if folder.local is not None:
        return MountedFiles(folder.local)
    if not isinstance(folder.place[0], fs.S3FileSystem):
        return PlainFiles(folder)
    try:
        import boto3  # noqa: F401
    except ImportError:
        return PlainFiles(folder, _NO_BOTO3)
    return S3Files(*folder.place)


def owner_of(folder: RunFolder) -> str | None:
    """Return the owner of a folder, for messages; None where there is none or it is dead."""
    with suppress(OSError):
        for number in numbers_in(folder)[-1:]:
            content = lease_files(folder).read(number)
            record = None if content is None else Record.read(content)
            if record is not None and is_alive(record.owner) is not False:
                return owner_text(record)
    return None


@contextmanager
def owned(
    folder: RunFolder,
    ticket: Ticket | None = None,
    *,
    wait: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[RunFolder, Lease]]:
    """Own a folder while the block runs; arguments and errors as for `take`.

    Yields the folder, which checks the lease before it changes a file, and the lease. Raises a
    RunError where the folder was lost.
    """
    lease = take(folder, ticket, wait=wait, tell=tell)
    try:
        yield folder.guarded(lease.check), lease
    except (InterruptedRunError, GeneratorExit):
        if lease.lost:
            # The loss stopped the run, not the user.
            lease.check()
        raise
    finally:
        lease.release()


def take(
    folder: RunFolder,
    ticket: Ticket | None = None,
    *,
    wait: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    pace: Pace | None = None,
) -> Lease:
    """Make this process the owner of a run folder.

    A folder without an owner, with an owner that is dead on this machine, or with one of the same
    ticket is taken at once.

    Args:
        folder: the run folder; made where it does not exist.
        ticket: of the run; default a new one.
        wait: watch the lease of another owner, and take the folder once the lease is stale.
        tell: called with one line before such a wait.
        pace: of renewals and of the wait; default `PACE`.

    Raises:
        RunFolderError: another process owns the folder, or it cannot be read or written.
    """
    ticket = ticket or Ticket(uuid4().hex)
    watch = _Watch(folder.location, pace or PACE, wait, tell)
    made = folder.missing_folders()
    try:
        files = lease_files(folder)
        try:
            number, record = _take(folder, files, ticket, watch)
        except NoConditionalWritesError:
            files = PlainFiles(folder, _NO_CONDITIONS)
            number, record = _take(folder, files, ticket, watch)
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder.location}: expected a folder that can be read and written; {error}"
        ) from error
    return Lease(folder, files, number, record, watch.pace, made)


def _take(
    folder: RunFolder, files: LeaseFiles, ticket: Ticket, watch: _Watch
) -> tuple[int, Record]:
    """Create the next lease file once the newest one may be replaced; return number and record."""
    began = seconds()
    while True:
        numbers = numbers_in(folder)
        newest = files.read(numbers[-1]) if numbers else None
        if newest is not None:
            began = seconds()
            record = Record.read(newest)
            dead = record is not None and is_alive(record.owner) is False
            replaceable = dead or _has_ticket(record, ticket)
            if not replaceable and not watch.is_stale(numbers[-1], newest, record):
                continue
        elif numbers:
            # It was released after it was listed.
            if seconds() - began > watch.pace.stale_s:
                raise OSError(f"{file_name(numbers[-1])} is listed, but is not there")
            time.sleep(watch.pace.renew_s / 6)
            continue
        number, own = numbers[-1] + 1 if numbers else 1, Record.new(ticket)
        if files.create(number, own.content()):
            # While this process was suspended, others may have used and removed this number.
            newer = {*numbers_in(folder)} - {number, *numbers}
            if not newer and _remove_earlier(files, ticket, numbers, newest):
                return number, own
            files.remove(number)
        # Another process was faster.
        time.sleep(random.uniform(0.0, watch.pace.renew_s / 10))


def _has_ticket(record: Record | None, ticket: Ticket) -> bool:
    return record is not None and record.run == ticket.run


def _remove_earlier(
    files: LeaseFiles, ticket: Ticket, numbers: list[int], newest: bytes | None
) -> bool:
    """Remove earlier lease files; return False where the newest has changed since the decision."""
    for number in reversed(numbers):
        while (content := files.read(number)) is not None:
            changed = number == numbers[-1] and content != newest
            if changed and not _has_ticket(Record.read(content), ticket):
                return False
            files.remove(number)
    return True


@dataclass
class _Watch:
    """Watches the lease of another owner until it is stale; fields as the arguments of `take`."""

    location: str
    pace: Pace
    wait: bool
    tell: Callable[[str], None]
    _seen: tuple[int, bytes] | None = None
    _unchanged_s: float = 0.0
    _watched_s: float = 0.0
    _looked_at: float = field(default_factory=seconds)

    def is_stale(self, number: int, content: bytes, record: Record | None) -> bool:
        """Compare the lease with the last look, and wait a moment where it is not stale yet.

        Raises RunFolderError where the owner is alive, or the caller does not want to wait.
        """
        if not self.wait:
            raise self._refusal(record)
        step_s = self.pace.renew_s / 6
        now = seconds()
        # At most a few steps count: this process itself may have been suspended.
        passed_s, self._looked_at = min(now - self._looked_at, 3 * step_s), now
        if self._seen is None:
            self.tell(
                f"run folder {self.location} is owned by {owner_text(record)}; waiting up to"
                f" {self.pace.stale_s:.0f} s to see whether it is still alive"
            )
        else:
            self._watched_s += passed_s
            changed = self._seen != (number, content)
            self._unchanged_s = 0.0 if changed else self._unchanged_s + passed_s
            starter = None if record is None else record.starter
            orphan = starter is not None and is_alive(starter) is False
            # The driver of a killed command ends within seconds.
            if changed and not (orphan and self._watched_s <= 2 * self.pace.stale_s):
                raise self._refusal(record)
        self._seen = number, content
        if self._unchanged_s >= self.pace.stale_s:
            return True
        time.sleep(step_s)
        return False

    def _refusal(self, record: Record | None) -> RunFolderError:
        hint = "" if self.wait else "; if it was killed, --resume takes the folder over"
        return RunFolderError(
            f"run folder {self.location} is owned by {owner_text(record)}, whose run is still"
            f" active: stop it first, or choose another --out{hint}"
        )
