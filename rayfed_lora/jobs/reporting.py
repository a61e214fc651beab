"""Progress of a run in the record of its own Ray job.

Ray's dashboard shows the record, and `rayfed-lora status` reads it through the dashboard's port.

Source: this project.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rayfed_lora.jobs.views import PROGRESS, PROGRESS_JSON, JobProgress, run_metadata
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import job_id
from rayfed_lora.runs.status import Status

_EVERY_S = 2.0


@contextmanager
def reporting(
    recipe: Recipe, location: str, watch: Callable[[Status], None]
) -> Iterator[Callable[[Status], None]]:
    """Report a run to the Ray job whose command this process is; outside a job, change nothing.

    Args:
        recipe: the run.
        location: its folder, as the nodes see it.
        watch: called with each status, too.

    Yields:
        The function to call with each status in place of `watch`.
    """
    job = job_id()
    if job is None:
        yield watch
        return
    reporter = _Reporter(job, run_metadata(recipe, location), watch)
    try:
        yield reporter.update
    finally:
        reporter.flush()


class _Reporter:
    def __init__(
        self, job: str, metadata: Mapping[str, str], watch: Callable[[Status], None]
    ) -> None:
        self._job = job
        self._metadata = metadata
        self._watch = watch
        self._newest: Status | None = None
        self._reported_at = 0.0

    def update(self, status: Status) -> None:
        self._newest = status
        if time.monotonic() - self._reported_at >= _EVERY_S:
            self.flush()
        self._watch(status)

    def flush(self) -> None:
        if self._newest is None:
            return
        progress = JobProgress.of(self._newest, time.time())
        line = progress.line()
        metadata = {**self._metadata, PROGRESS: line, PROGRESS_JSON: progress.model_dump_json()}
        from ray.exceptions import RayError

        # A failed report does not end the run.
        with suppress(RayError, ValueError):
            _update_record(self._job, metadata, line)
        self._reported_at = time.monotonic()


def _update_record(job: str, metadata: Mapping[str, str], message: str) -> None:
    """Write into the record that Ray keeps of a running job.

    Ray itself writes the record before the job's command starts and after its end. Ray has no
    public call for this: if a later version keeps another form of record, nothing is written, and
    only the progress is missing.
    """
    from ray.experimental import internal_kv

    key, namespace = f"_ray_internal_job_info_{job}", "job"
    content = internal_kv._internal_kv_get(key, namespace=namespace)
    record: Any = None if content is None else json.loads(content)
    if not isinstance(record, dict) or record.get("status") != "RUNNING":
        return
    record["metadata"] = {**(record.get("metadata") or {}), **metadata}
    record["message"] = message
    internal_kv._internal_kv_put(key, json.dumps(record), overwrite=True, namespace=namespace)
