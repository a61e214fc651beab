"""A lease that this process holds. Source: this project."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePath

from rayfed_lora.errors import RayfedError, RunError
from rayfed_lora.runs.leases.files import MountedFiles, PlainFiles, numbers_in
from rayfed_lora.runs.leases.processes import is_alive
from rayfed_lora.runs.leases.record import Pace, Record, Ticket, owner_text, seconds
from rayfed_lora.runs.leases.s3_files import S3Files
from rayfed_lora.storage import RunFolder

LeaseFiles = MountedFiles | S3Files | PlainFiles


class Lease:
    """A folder that this process owns until `release`; a thread renews the lease."""

    def __init__(
        self,
        folder: RunFolder,
        files: LeaseFiles,
        number: int,
        record: Record,
        pace: Pace,
        made: Sequence[PurePath],
    ) -> None:
        """Start to renew a lease whose file was just created.

        Args:
            folder: the run folder.
            files: its lease files.
            number: of the created file.
            record: its content.
            pace: of the renewals.
            made: folders that did not exist before.
        """
        self._folder = folder
        self._files = files
        self._number = number
        self._record = record
        self._content = record.content()
        self._pace = pace
        self._made = made
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
        return Ticket(self._record.run, self._record.starter)

    @property
    def note(self) -> str | None:
        """A warning for the user about the folder's storage, or None."""
        return self._files.note

    @property
    def lost(self) -> bool:
        """Whether this process is known to have lost the folder; reads no file."""
        return self._loss is not None

    def or_lost(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a stop condition that is also true once the folder is lost."""
        return lambda: self.lost or should_stop()

    def check(self) -> None:
        """Check that this process still owns the folder: called before each write.

        Raises:
            RunError: another process owns it, or the lease cannot be read.
        """
        where = f"run folder {self._folder.location}"
        with self._lock:
            began = seconds()
            while self._loss is None:
                try:
                    self._check_files()
                    break
                except OSError as error:
                    if seconds() - began > self._pace.stale_s:
                        raise RunError(
                            f"{where}: its lease cannot be read ({error}); nothing more is saved"
                        ) from error
                time.sleep(self._pace.renew_s / 3)
            if self._loss is not None:
                raise RunError(f"{where}: {self._loss}; nothing more is saved")

    def release(self) -> None:
        """Stop renewing, and remove the lease unless it was lost or kept."""
        self._ended.set()
        if self._kept:
            return
        with self._lock, suppress(OSError, RayfedError):
            if self._own(self._files.read(self._number)) is not None:
                self._files.remove(self._number)
            self._folder.remove_empty(self._made)

    def keep(self) -> None:
        """Stop renewing, and leave the lease to a process with the same ticket."""
        self._ended.set()
        self._kept = True

    def handed_over(self) -> bool:
        """Return whether another process has taken the folder."""
        with self._lock, suppress(OSError):
            return self._files.read(self._number) is None
        return False

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._pace.renew_s):
            # A failed request does not tell who owns the folder: a later one decides.
            with self._lock, suppress(OSError):
                if not self._ended.is_set() and self._loss is None and not self._is_orphan():
                    self._renew()

    def _check_files(self) -> None:
        """Find out whether the folder is still owned.

        Raises:
            OSError: the lease cannot be read, and another process may have taken the folder.
        """
        if self._is_orphan():
            return
        now = seconds()
        if now - self._renewed_at > self._pace.stale_s / 2:
            # This process or the storage was suspended, so another process may be about to take
            # the folder. It sees the counter change, or has finished after a moment.
            self._renew()
            time.sleep(self._pace.renew_s / 3)
            self._read()
        elif not self._files.remote or now - self._seen_at > self._pace.renew_s / 3:
            # No other process takes a lease that was renewed recently.
            with suppress(OSError):
                self._read()

    def _is_orphan(self) -> bool:
        """Give the folder up, and return True, where the command that started the run is gone."""
        starter = self._record.starter
        if starter is None or is_alive(starter) is not False:
            return False
        self._loss = f"the command that started this run ({starter.pid}) is gone"
        return True

    def _renew(self) -> None:
        record = replace(self._record, counter=self._record.counter + 1)
        if self._files.rewrite(self._number, self._content, record.content()):
            self._record, self._content = record, record.content()
            self._renewed_at = self._seen_at = seconds()
        else:
            # An earlier renewal may have succeeded although its answer was lost.
            self._read()

    def _read(self) -> None:
        content = self._files.read(self._number)
        found = self._own(content)
        if content is None or found is None:
            self._loss = self._loss_text()
        else:
            self._record, self._content, self._seen_at = found, content, seconds()

    def _own(self, content: bytes | None) -> Record | None:
        """Return the record in a file's content where it is that of this lease."""
        found = None if content is None else Record.read(content)
        return None if found is None or found.token != self._record.token else found

    def _loss_text(self) -> str:
        with suppress(OSError):
            for number in numbers_in(self._folder)[-1:]:
                content = self._files.read(number)
                if content is not None:
                    return f"this process has lost it to {owner_text(Record.read(content))}"
        return "this process has lost it to another one, or its lease file was removed"
