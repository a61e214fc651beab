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
from uuid import uuid4

from pyarrow import fs

from rayfed_lora.errors import InterruptedRunError, RunFolderError
from rayfed_lora.runs.leases.files import LeaseFiles, NoConditionalWritesError, file_name
from rayfed_lora.runs.leases.lease import Lease
from rayfed_lora.runs.leases.mounted_files import MountedFiles
from rayfed_lora.runs.leases.plain_files import PlainFiles
from rayfed_lora.runs.leases.processes import is_alive
from rayfed_lora.runs.leases.record import Pace, Record, Ticket
from rayfed_lora.runs.leases.watch import Watch, seconds
from rayfed_lora.storage import RunFolder

__all__ = ["PACE", "Lease", "Pace", "Ticket", "lease_files", "owned", "owner_of", "take"]

PACE = Pace()
_NO_BOTO3 = (
    "boto3 is not installed (pip install 'rayfed-lora[aws]'): two runs that are started into one"
    " s3:// folder at the same moment may not notice each other"
)
_NO_CONDITIONS = (
    "the object store has no conditional writes: two runs that are started into one folder at the"
    " same moment may not notice each other"
)


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
    from rayfed_lora.runs.leases.s3_files import S3Files

    return S3Files(*folder.place)


def owner_of(folder: RunFolder) -> str | None:
    """Return the owner of a folder, for messages; None where there is none or it is dead."""
    with suppress(OSError):
        files = lease_files(folder)
        for number in files.numbers()[-1:]:
            content = files.read(number)
            record = None if content is None else Record.read(content)
            if record is not None and is_alive(record.owner) is not False:
                return record.owner_text
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
    pace = pace or PACE
    ticket = ticket or Ticket(uuid4().hex)

    def take_by(files: LeaseFiles) -> Lease:
        number, record = _take(files, ticket, Watch(folder.location, pace, wait, tell))
        return Lease(folder.location, files, number, record, pace)

    try:
        try:
            return take_by(lease_files(folder))
        except NoConditionalWritesError:
            return take_by(PlainFiles(folder, _NO_CONDITIONS))
    except OSError as error:
        raise RunFolderError(
            f"run folder {folder.location}: expected a folder that can be read and written; {error}"
        ) from error


def _take(files: LeaseFiles, ticket: Ticket, watch: Watch) -> tuple[int, Record]:
    """Create the next lease file once the newest one may be replaced; return number and record."""
    began = seconds()
    while True:
        numbers = files.numbers()
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
            newer = {*files.numbers()} - {number, *numbers}
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
