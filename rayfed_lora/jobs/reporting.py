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

    Yields the function to call with each status in place of `watch`, which it calls, too.
    `location` is the run folder as the nodes see it.
    """
    job = job_id()
    if job is None:
        yield watch
        return
    metadata = run_metadata(recipe, location)
    newest: Status | None = None
    reported_at = 0.0

    def update(status: Status) -> None:
        nonlocal newest, reported_at
        newest = status
        if time.monotonic() - reported_at >= _EVERY_S:
            _report(job, metadata, status)
            reported_at = time.monotonic()
        watch(status)

    try:
        yield update
    finally:
        if newest is not None:
            _report(job, metadata, newest)


def _report(job: str, metadata: Mapping[str, str], status: Status) -> None:
    from ray.exceptions import RayError

    progress = JobProgress.of(status, time.time())
    line = progress.line()
    metadata = {**metadata, PROGRESS: line, PROGRESS_JSON: progress.model_dump_json()}
    # A failed report does not end the run.
    with suppress(RayError, ValueError):
        _update_record(job, metadata, line)


def _update_record(job: str, metadata: Mapping[str, str], message: str) -> None:
    """Write into the record that Ray keeps of a running job, for which it has no public call.

    Ray itself writes the record before the job's command starts and after its end. A later Ray
    with another form of record loses the progress only: nothing is written.
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
