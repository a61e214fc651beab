"""A lease that this process holds. Source: this project."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePath

from rayfed_lora.errors import RayfedError, RunError
from rayfed_lora.runs.leases.lease_files import MountedFiles, PlainFiles, numbers_in
from rayfed_lora.runs.leases.record import Pace, Record, Ticket, is_alive, owner_text, seconds
from rayfed_lora.runs.leases.s3_files import S3Files
from rayfed_lora.storage import RunFolder

LeaseFiles = MountedFiles | S3Files | PlainFiles


@dataclass(eq=False)
class Lease:
    """A folder that this process owns until `release`; a thread renews the lease.

    Attributes:
        folder: the run folder; `made` are its folders that did not exist before.
        files: its lease files.
        number, record: of the file of this lease, which was just created.
        pace: of the renewals.
    """

    folder: RunFolder
    files: LeaseFiles
    number: int
    record: Record
    pace: Pace
    made: Sequence[PurePath]

    def __post_init__(self) -> None:
        """Start to renew the lease."""
        self._loss: str | None = None
        self._kept = False
        # The last successful renewal, and the last time that the file was seen to be this lease's.
        self._renewed_at = self._seen_at = seconds()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._keep_renewing, name="lease", daemon=True).start()

    @property
    def ticket(self) -> Ticket:
        """The right to take the folder over from this process."""
        return Ticket(self.record.run, self.record.starter)

    @property
    def lost(self) -> bool:
        """Whether this process is known to have lost the folder; reads no file."""
        return self._loss is not None

    def or_lost(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a stop condition that is also true once the folder is lost."""
        return lambda: self.lost or should_stop()

    def check(self) -> None:
        """Raise a RunError unless this process still owns the folder: called before each write."""
        where = f"run folder {self.folder.location}"
        with self._lock:
            began = seconds()
            while self._loss is None:
                try:
                    self._check_files()
                    break
                except OSError as error:
                    if seconds() - began > self.pace.stale_s:
                        raise RunError(
                            f"{where}: its lease cannot be read ({error}); nothing more is saved"
                        ) from error
                time.sleep(self.pace.renew_s / 3)
            if self._loss is not None:
                raise RunError(f"{where}: {self._loss}; nothing more is saved")

    def release(self) -> None:
        """Stop renewing, and remove the lease unless it was lost or kept."""
        self._ended.set()
        if self._kept:
            return
        with self._lock, suppress(OSError, RayfedError):
            if self._own_record() is not None:
                self.files.remove(self.number)
            # An object store removes a folder with whatever another process has just put there.
            if not isinstance(self.files, S3Files):
                self.folder.remove_empty(self.made)

    def keep(self) -> None:
        """Stop renewing, and leave the lease to a process with the same ticket."""
        self._ended.set()
        self._kept = True

    def handed_over(self) -> bool:
        """Return whether another process has taken the folder."""
        with self._lock, suppress(OSError):
            return self.files.read(self.number) is None
        return False

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self.pace.renew_s):
            # A failed request does not tell who owns the folder: a later one decides.
            with self._lock, suppress(OSError):
                if not self._ended.is_set() and self._loss is None and not self._is_orphan():
                    self._renew()

    def _check_files(self) -> None:
        """Find out whether the folder is still owned; an OSError where that cannot be known."""
        if self._is_orphan():
            return
        now = seconds()
        if now - self._renewed_at > self.pace.stale_s / 2:
            # This process or the storage was suspended, so another process may be about to take
            # the folder. It sees the counter change, or has finished after a moment.
            self._renew()
            time.sleep(self.pace.renew_s / 3)
            self._read()
        elif not self.files.remote or now - self._seen_at > self.pace.renew_s / 3:
            # No other process takes a lease that was renewed recently.
            with suppress(OSError):
                self._read()

    def _is_orphan(self) -> bool:
        """Give the folder up, and return True, where the command that started the run is gone."""
        starter = self.record.starter
        if starter is None or is_alive(starter) is not False:
            return False
        self._loss = f"the command that started this run ({starter.pid}) is gone"
        return True

    def _renew(self) -> None:
        record = replace(self.record, counter=self.record.counter + 1)
        if self.files.rewrite(self.number, self.record.content(), record.content()):
            self.record, self._renewed_at, self._seen_at = record, seconds(), seconds()
        else:
            # An earlier renewal may have succeeded although its answer was lost.
            self._read()

    def _read(self) -> None:
        found = self._own_record()
        if found is None:
            self._loss = self._loss_text()
        else:
            self.record, self._seen_at = found, seconds()

    def _own_record(self) -> Record | None:
        """Return what the lease's file holds, None where that is not this lease."""
        content = self.files.read(self.number)
        found = None if content is None else Record.read(content)
        return None if found is None or found.token != self.record.token else found

    def _loss_text(self) -> str:
        with suppress(OSError):
            for number in numbers_in(self.folder)[-1:]:
                content = self.files.read(number)
                if content is not None:
                    return f"this process has lost it to {owner_text(Record.read(content))}"
        return "this process has lost it to another one, or its lease file was removed"
