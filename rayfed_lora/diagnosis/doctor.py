"""The diagnosis of a machine or a cluster. Source: this project."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rayfed_lora.diagnosis.findings import Finding
from rayfed_lora.endpoints import named_in
from rayfed_lora.engines.on_ray.placement import nodes_of
from rayfed_lora.errors import ResourceError
from rayfed_lora.jobs.jobs import Jobs
from rayfed_lora.jobs.local_files import files_named
from rayfed_lora.jobs.views import JobView
from rayfed_lora.launching.ray_session import ray_session
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml, shipped_names
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.location import absolute_place, refuse_relative, with_absolute_paths
from rayfed_lora.storage import refuse_secrets


def doctor(
    address: str | None = None,
    recipes: Sequence[str | Path | Recipe] = (),
    *,
    storage: str | None = None,
    probe: bool = False,
) -> list[Finding]:
    """Check a cluster, or this machine, and say how to fix what is wrong.

    Args:
        address: of a running Ray cluster; default $RAY_ADDRESS, or an own Ray.
        recipes: to check for room and data; default the shipped ones.
        storage: folder or URI that every node must be able to write.
        probe: measure the GPU memory of the recipes by short runs.

    Raises:
        RecipeError: a recipe has faults.
    """
    if storage is not None:
        refuse_secrets(storage)
    checked = [with_absolute_paths(load_recipe(each)) for each in recipes]
    shipped = not checked
    checked = checked or [load_recipe(name) for name in shipped_names()]
    try:
        with ray_session(address):
            own = not (address or os.environ.get("RAY_ADDRESS"))
            return _findings(checked, shipped, storage, probe, own)
    except ResourceError as error:
        fix = (
            "start a cluster (ray start --head, or ray up), or give the address of one; from"
            " outside a cluster that of its dashboard, e.g. http://127.0.0.1:8265"
        )
        return [Finding("fault", "Ray", str(error), fix)]


def _findings(
    recipes: Sequence[Recipe], shipped: bool, storage: str | None, probe: bool, own: bool
) -> list[Finding]:
    # After `ray_session`: Ray reads its settings at import.
    import ray

    from rayfed_lora.diagnosis import node_checks, node_report
    from rayfed_lora.diagnosis.dashboard_check import check_dashboard
    from rayfed_lora.diagnosis.recipe_checks import check_gpu_memory, check_recipes

    nodes = [node for node in ray.nodes() if node["Alive"]]
    reports = node_checks.reports(nodes)
    answering = {report.node for report in reports if not report.error}
    live = [node for node in nodes if node_checks.node_name(node) in answering]
    folders = sorted({absolute_place(folder) for folder in _folders(recipes, storage)})
    where = ", started here for this check: no --address was given" if own else ""
    return [
        Finding("ok", "Ray", f"{ray.__version__}, {len(nodes)} nodes{where}"),
        *node_report.check_nodes(reports),
        *node_report.check_versions(reports),
        *node_report.check_gpus(reports),
        *node_checks.check_network(live),
        *([] if own else check_dashboard()),
        *(found for folder in folders for found in node_checks.check_storage(folder, live)),
        *check_recipes(recipes, shipped, live),
        *(check_gpu_memory(recipes, nodes_of(live)) if probe else []),
    ]


def _folders(recipes: Sequence[Recipe], storage: str | None) -> list[str]:
    named = [storage, *(recipe.storage.path for recipe in recipes)]
    return [folder for folder in named if folder]


def examine(
    address: str | None,
    recipes: Sequence[Recipe],
    *,
    storage: str | None,
    probe: bool,
    show: Callable[[str], None],
) -> list[Finding] | JobView:
    """Run `rayfed-lora doctor` as a job of a cluster that only its dashboard reaches; follow it.

    Arguments as for `doctor`; `show` is called with the output of the job.

    Returns:
        How the job ended, or the reason why no job can be started.

    Raises:
        BadInputError: the path of a folder is relative.
    """
    if storage is not None:
        refuse_secrets(storage)
    for place in _folders(recipes, storage):
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
