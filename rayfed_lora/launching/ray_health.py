"""Whether the Ray under a run still works. Source: this project.

A command that has lost Ray's control store (GCS) would be ended by Ray itself after a minute.
"""

from __future__ import annotations

import time

import ray

from rayfed_lora.jobs.dashboard import unreachable_cluster
from rayfed_lora.launching.ray_session import RayLostError

_LOOK_S = 5.0
_LOOKS = 3


class RayHealth:
    """Looks whether Ray's processes on this machine run, and whether its control store answers."""

    def __init__(self, resume: str) -> None:
        """Take the connected Ray; `resume` tells the user how to resume."""
        self.hint = f"Finished rounds are kept: {resume}"
        self._gcs: str = ray.get_runtime_context().gcs_address
        self._looked_at, self._failures = time.monotonic(), 0

    def check(self) -> None:
        """Raise a RayLostError where Ray has ended; cheap enough for every poll."""
        # No public function tells of the processes that `ray.init` has started.
        dead = {kind for kind, _ in ray._private.worker._global_node.dead_processes()}
        if ended := sorted(dead & {"raylet", "gcs_server"}):
            raise self._lost(f"its {' and '.join(ended)} on this machine ended")
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        reason = unreachable_cluster(self._gcs)
        self._failures = 0 if reason is None else self._failures + 1
        if self._failures == _LOOKS:
            raise self._lost(f"its head at {self._gcs} does not answer: {reason}")

    def _lost(self, reason: str) -> RayLostError:
        return RayLostError(f"Ray was lost: {reason}, killed or out of memory. {self.hint}")
