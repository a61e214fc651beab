"""Watching the counter of another process's lease until it is stale. Source: this project."""

from __future__ import annotations

import time
from collections.abc import Callable

from rayfed_lora.errors import RunFolderError
from rayfed_lora.runs.leases.processes import is_alive
from rayfed_lora.runs.leases.record import Pace, Record, owner_text


def seconds() -> float:
    """Return a clock's seconds; where the system has such a clock, it includes suspended time."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Watch:
    """Watches the lease of another owner until it is stale."""

    def __init__(self, location: str, pace: Pace, wait: bool, tell: Callable[[str], None]) -> None:
        """Start; `location` is the run folder's, the other arguments are those of `take`."""
        self.pace = pace
        self._location = location
        self._wait = wait
        self._tell = tell
        self._seen: tuple[int, bytes] | None = None
        self._unchanged_s = self._watched_s = 0.0
        self._looked_at = seconds()

    def is_stale(self, number: int, content: bytes, record: Record | None) -> bool:
        """Compare the lease with the last look, and wait a moment where it is not stale yet.

        Args:
            number: of the lease file.
            content: of the lease file.
            record: the parsed content.

        Raises:
            RunFolderError: the owner is alive, or the caller does not want to wait.
        """
        if not self._wait:
            raise self._refusal(record)
        step_s = self.pace.renew_s / 6
        now = seconds()
        # At most a few steps count: this process itself may have been suspended.
        passed_s, self._looked_at = min(now - self._looked_at, 3 * step_s), now
        if self._seen is None:
            self._tell(
                f"run folder {self._location} is owned by {owner_text(record)}; waiting up to"
                f" {self.pace.stale_s:.0f} s to see whether it is still alive"
            )
        else:
            self._watched_s += passed_s
            changed = self._seen != (number, content)
            self._unchanged_s = 0.0 if changed else self._unchanged_s + passed_s
            # The driver of a killed command ends within seconds.
            ending = _lost_its_starter(record) and self._watched_s <= 2 * self.pace.stale_s
            if changed and not ending:
                raise self._refusal(record)
        self._seen = number, content
        if self._unchanged_s >= self.pace.stale_s:
            return True
        time.sleep(step_s)
        return False

    def _refusal(self, record: Record | None) -> RunFolderError:
        hint = "" if self._wait else "; if it was killed, --resume takes the folder over"
        return RunFolderError(
            f"run folder {self._location} is owned by {owner_text(record)}, whose run is still"
            f" active: stop it first, or choose another --out{hint}"
        )


def _lost_its_starter(record: Record | None) -> bool:
    starter = None if record is None else record.starter
    return starter is not None and is_alive(starter) is False
