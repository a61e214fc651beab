"""The inside of a Ray job: which job this process is, and telling the cluster how the run stands.

What is told goes into the job's own record: Ray's dashboard shows it, and `rayfed-lora status`
reads it through the dashboard's port alone.

Source: this project.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rayfed_lora.jobs.views import JobProgress
from rayfed_lora.recipe.loading import recipe_yaml
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import job_id
from rayfed_lora.runs.status import Status

# Keys of a job's metadata. Those of `facts` mark a job as one of ours.
RECIPE_NAME = "recipe"
RUN_FOLDER = "run folder"
PROGRESS = "progress"
RECIPE_YAML = "rayfed_lora.recipe.recipe"
PROGRESS_JSON = "rayfed_lora.progress"

_EVERY_S = 2.0


def facts(recipe: Recipe, location: str) -> dict[str, str]:
    """Return the metadata of a job that runs a recipe; all that `resume` needs."""
    return {
        RECIPE_NAME: recipe.name,
        RUN_FOLDER: location,
        RECIPE_YAML: recipe_yaml(recipe),
    }


@contextmanager
def told(
    recipe: Recipe, location: str, watch: Callable[[Status], None]
) -> Iterator[Callable[[Status], None]]:
    """Let the Ray job that this process is the command of tell of the run; nothing elsewhere.

    Args:
        recipe: the run.
        location: its folder, as the nodes see it.
        watch: who else is told.

    Yields:
        What to call with each status in place of `watch`.
    """
    job = job_id()
    if job is None:
        yield watch
        return
    teller = _Teller(job, facts(recipe, location), watch)
    try:
        yield teller.tell
    finally:
        teller.last()


class _Teller:
    def __init__(self, job: str, facts: Mapping[str, str], watch: Callable[[Status], None]) -> None:
        self._job = job
        self._facts = facts
        self._watch = watch
        self._newest: Status | None = None
        self._told_at = 0.0

    def tell(self, status: Status) -> None:
        self._newest = status
        if time.monotonic() - self._told_at >= _EVERY_S:
            self.last()
        self._watch(status)

    def last(self) -> None:
        if self._newest is None:
            return
        progress = JobProgress.of(self._newest, time.time())
        line = progress.line()
        told = {**self._facts, PROGRESS: line, PROGRESS_JSON: progress.model_dump_json()}
        from ray.exceptions import RayError

        # A run that cannot tell of itself goes on.
        with suppress(RayError, ValueError):
            _record(self._job, told, line)
        self._told_at = time.monotonic()


def _record(job: str, metadata: Mapping[str, str], message: str) -> None:
    """Write into the record that Ray keeps of a running job.

    Ray itself writes to it before the job's command starts and after it has ended. It offers no
    call for this: where its record looks otherwise, nothing is written, and nothing is lost but
    the progress.
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
