"""Locations of run folders, and local files that recipes name. Source: this project."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from rayfed_lora.errors import BadInputError
from rayfed_lora.locations import each, is_uri, pattern_start
from rayfed_lora.plugins.tables import DATA
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.recipe import Recipe

# Default place of Ray jobs' runs, on the head node: a job's own folder is temporary.
JOB_RUNS = "~/rayfed-lora-runs"
# Ray sets this variable for the command of a job only, not for its workers.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def job_id() -> str | None:
    """Return the submission id if this process is the command of a Ray job, else None."""
    try:
        found = json.loads(os.environ[_JOB_CONFIG])["metadata"]["job_submission_id"]
    except (LookupError, TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None


def run_location(given: str | None, name: str) -> str:
    """Return a given location, or that of a new folder.

    The name of the new folder is made of `name`, the time and a random number; it is in `runs/`, or
    in a Ray job in `JOB_RUNS`. `~` is the home folder. Raises BadInputError for a relative path in
    a Ray job.
    """
    in_job = job_id() is not None
    unique = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:6]}"
    location = os.path.expanduser(given or f"{JOB_RUNS if in_job else 'runs'}/{unique}")
    if in_job:
        refuse_relative(location)
    return location


def absolute_place(location: str) -> str:
    """Return the absolute path of a folder; a URI unchanged."""
    return location if is_uri(location) else os.path.abspath(os.path.expanduser(location))


def refuse_relative(location: str) -> None:
    """Raise a BadInputError for a relative path, which would not outlive a Ray job."""
    if not is_uri(location) and not location.startswith(("/", "~")):
        raise BadInputError(
            f"run folder {location!r}: expected an absolute path that the cluster's nodes see, or a"
            " URI such as s3://bucket/runs/a: the working folder of a Ray job is temporary"
        )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the paths of local files and folders absolute: workers may run in another folder."""
    availability = _with_absolute(recipe.clients.availability, "trace")
    harness, include = recipe.evaluation.harness, recipe.evaluation.harness.include
    if include is not None:
        harness = harness.model_copy(update={"include": absolute_place(include)})
    changed = {
        "evaluation": recipe.evaluation.model_copy(update={"harness": harness}),
        "clients": recipe.clients.model_copy(update={"availability": availability}),
        "data": _with_absolute(recipe.data, "source", "test_source"),
        "model": _with_absolute(recipe.model, "source", "tokenizer", "adapter"),
    }
    return recipe.model_copy(update=changed)


def _with_absolute(section: BaseModel, *keys: str) -> BaseModel:
    is_data = isinstance(section, Data)
    changed: dict[str, Any] = {}
    for key in keys:
        value = getattr(section, key)
        paths = [_absolute(one, is_data) for one in each(value)]
        changed[key] = paths if isinstance(value, list) else paths[0] if paths else None
    return section.model_copy(update=changed)


def _absolute(source: str, is_data: bool) -> str:
    """Return the absolute path of local files or a folder; anything else unchanged."""
    start = None if is_uri(source) else pattern_start(os.path.expanduser(source))
    if start is not None:
        folder, parts = start
        return os.path.join(os.path.abspath(folder), *parts) if os.path.isdir(folder) else source
    if os.path.exists(os.path.expanduser(source)):
        source = os.path.expanduser(source)
    # A folder that happens to have the name of a data set does not hide that name.
    is_folder = source not in DATA if is_data else Path(source, "config.json").is_file()
    is_path = Path(source).suffix or os.sep in source or is_folder
    return os.path.abspath(source) if is_path and os.path.exists(source) else source
