"""The diagnosis of a cluster that only its dashboard reaches: a Ray job. Source: this project."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from rayfed_lora.doctor.findings import Finding
from rayfed_lora.endpoints import named_in
from rayfed_lora.errors import ResourceError
from rayfed_lora.jobs.jobs import Jobs
from rayfed_lora.jobs.local_files import files_named
from rayfed_lora.jobs.views import JobView
from rayfed_lora.recipe.loading import recipe_yaml
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import refuse_relative, with_absolute_paths
from rayfed_lora.storage import refuse_secrets


def examine(
    address: str | None,
    recipes: Sequence[Recipe],
    *,
    storage: str | None,
    probe: bool,
    show: Callable[[str], None],
) -> list[Finding] | JobView:
    """Run `rayfed-lora doctor` as a job of a cluster and follow it.

    Args:
        address: of the dashboard.
        recipes: as for `doctor`; so are the next two.
        storage: folder or URI.
        probe: measure GPU memory.
        show: called with the output of the job.

    Returns:
        How the job ended, or the reason why no job can be started.

    Raises:
        BadInputError: the path of a folder is relative.
    """
    if storage is not None:
        refuse_secrets(storage)
    for place in filter(None, [storage, *(recipe.storage.path for recipe in recipes)]):
        refuse_relative(place)
    for recipe in recipes:
        files_named(recipe)
    try:
        jobs = Jobs(address)
    except ResourceError as error:
        fix = "start the cluster, open the tunnel to its dashboard, and set the token"
        return [Finding("fault", "dashboard", str(error), fix)]
    sent = map(with_absolute_paths, recipes)
    files = {f"recipe-{i}.yaml": recipe_yaml(recipe) for i, recipe in enumerate(sent)}
    command = ["rayfed-lora", "doctor", *(f"--recipe={name}" for name in files)]
    command += [] if storage is None else [f"--storage={storage}"]
    command += ["--probe"] * probe
    endpoints = frozenset[str]().union(*(named_in(recipe.model_dump()) for recipe in recipes))
    return jobs.follow(jobs.start("doctor", shlex.join(command), files, endpoints), show)
