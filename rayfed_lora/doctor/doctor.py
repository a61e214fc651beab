"""What a machine or cluster offers, what is wrong with it, and how to fix it.

Source: this project.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rayfed_lora.doctor.findings import Finding
from rayfed_lora.engines.on_ray.placement import Layout, Node, layout, nodes_of
from rayfed_lora.engines.on_ray.placement import wanted as asked_layout
from rayfed_lora.errors import BadInputError, ResourceError
from rayfed_lora.launching.launch import ray_session
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.shipped_recipes import shipped_names
from rayfed_lora.runs.location import absolute_place, with_absolute_paths
from rayfed_lora.storage import refuse_secrets

_ANSWER_S = 10.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def doctor(
    address: str | None = None,
    recipes: Sequence[str | Path | Recipe] = (),
    *,
    storage: str | None = None,
    probe: bool = False,
) -> list[Finding]:
    """Look at a cluster, or at this machine.

    Args:
        address: of a running Ray cluster; default $RAY_ADDRESS, or a Ray of our own.
        recipes: to be fitted in; default the shipped ones.
        storage: folder or URI that every node must be able to write.
        probe: measure the GPU memory of the recipes by short runs.

    Raises:
        RecipeError: a recipe has faults.
    """
    if storage is not None:
        refuse_secrets(storage)
    named = [load_recipe(r) for r in recipes]
    wanted = [with_absolute_paths(recipe) for recipe in named]
    shipped = not wanted
    wanted = wanted or [load_recipe(name) for name in shipped_names()]
    try:
        with ray_session(address):
            own = not (address or os.environ.get("RAY_ADDRESS"))
            return _examined(wanted, shipped, storage, probe, own)
    except ResourceError as error:
        fix = (
            "start a cluster (ray start --head, or ray up), or give the address of one; from"
            " outside of it the dashboard's, e.g. http://127.0.0.1:8265"
        )
        return [Finding("fault", "Ray", str(error), fix)]


def _examined(
    recipes: Sequence[Recipe], shipped: bool, storage: str | None, probe: bool, own: bool
) -> list[Finding]:
    import ray

    # Not before: Ray reads its settings when it is imported.
    from rayfed_lora.doctor import node_checks, node_report
    from rayfed_lora.doctor.probe import check_gpu_memory

    nodes = [node for node in ray.nodes() if node["Alive"]]
    reports = node_checks.reports(nodes)
    answering = {report.node for report in reports if not report.error}
    live = [node for node in nodes if node_checks.node_name(node) in answering]
    given = filter(None, [storage, *(recipe.storage.path for recipe in recipes)])
    places = sorted({absolute_place(place) for place in given})
    where = ", started here for this: no --address was given" if own else ""
    return [
        Finding("ok", "Ray", f"{ray.__version__}, {len(nodes)} nodes{where}"),
        *node_report.check_nodes(reports),
        *node_report.check_versions(reports),
        *node_report.check_gpus(reports),
        *node_checks.check_network(live),
        *([] if own else _dashboard()),
        *(f for place in places for f in node_checks.check_storage(place, live)),
        *check_recipes(recipes, shipped, live),
        *(check_gpu_memory(recipes, nodes_of(live)) if probe else []),
    ]


def check_recipes(
    recipes: Sequence[Recipe], shipped: bool, ray_nodes: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Say how many actors of each recipe fit, and what they need.

    Args:
        recipes: to be fitted in.
        shipped: nobody asked for these: data that are not there are no fault.
        ray_nodes: of `ray.nodes()`.
    """
    from rayfed_lora.launching.planning import plan

    nodes = nodes_of(ray_nodes)
    memory = [float(node["Resources"].get("memory", 0.0)) / 1e6 for node in ray_nodes]
    found = []
    for recipe in recipes:
        subject = f"recipe {recipe.name}"
        try:
            actor_mb = plan(recipe).actor_mb
            if recipe.runtime.scale_up_s is not None:
                asked = asked_layout(recipe.runtime)
                found.append(Finding("ok", subject, _brings(asked)))
                continue
            actors = layout(recipe.runtime, nodes, _most(recipe))
        except ResourceError as error:
            fix = "lower what is asked for, or add nodes"
            found.append(Finding("fault", subject, str(error), fix))
        except BadInputError as error:
            fix = "install what it names on every node, or name other data or another model"
            found.append(Finding("warning" if shipped else "fault", subject, str(error), fix))
        else:
            found.append(_fit(subject, actors, actor_mb, nodes, memory))
    return found


def _brings(asked: Layout) -> str:
    share = f"{asked.cpus:g} CPU and {asked.gpus:g} GPU"
    return f"waits for nodes with {asked.actors} times {share} (runtime.scale_up_s)"


def _most(recipe: Recipe) -> int:
    return recipe.cohort_size(recipe.data.partition.clients)


def _fit(
    subject: str, actors: Layout, actor_mb: float, nodes: Sequence[Node], memory: Sequence[float]
) -> Finding:
    """Compare what the actors of the fullest node take with the memory that Ray has there."""
    share = f"{actors.cpus:g} CPU" + (f" and {actors.gpus:g} GPU" if actors.gpus else "")
    text = (
        f"{actors.actors} client actors of {share} fit, about {actor_mb / 1e3:.2f} GB of memory"
        " each, without activations"
    )
    for node, free_mb in zip(nodes, memory, strict=True):
        there = min(actors.actors, actors.most_on(node))
        if free_mb > 0 and there * actor_mb > free_mb:
            text += f"; {there} on one node want more than its {free_mb / 1e3:.1f} GB"
            fix = "lower runtime.client_actors, or raise cpus_per_actor or gpus_per_actor"
            return Finding("warning", subject, text, fix)
    return Finding("ok", subject, text)


def _dashboard() -> list[Finding]:
    """Look at the dashboard, and whether it asks for a token."""
    import ray
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        url = ray_address_to_api_server_url(ray.get_runtime_context().gcs_address)
    except ValueError as error:
        fix = "install ray[default] on the head node"
        return [Finding("warning", "dashboard", f"none: {error}", fix)]
    return [judge_dashboard(url, answer_without_token(url))]


def answer_without_token(url: str) -> int | None:
    """Return the HTTP status of a request for jobs that brings no token, None without answer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/api/jobs/", timeout=_ANSWER_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def judge_dashboard(url: str, status: int | None) -> Finding:
    """Say who can run code through the dashboard.

    Args:
        url: of the dashboard.
        status: from `answer_without_token`.
    """
    if status is None:
        text = f"none answers at {url} from here: no jobs, no metrics, its token was not checked"
        fix = "look from the head node, or start the head with --include-dashboard=true"
        return Finding("warning", "dashboard", text, fix)
    if status in (401, 403):
        return Finding("ok", "dashboard", f"{url} asks for the token")
    fix = (
        "set RAY_AUTH_MODE=token on every node and client (ray get-auth-token --generate), and"
        " start the head with --dashboard-host=127.0.0.1"
    )
    if urlsplit(url).hostname in _LOOPBACK:
        text = f"{url} asks for no token: every user of the head node can run code in the cluster"
        return Finding("warning", "token", text, fix)
    text = f"{url} asks for no token: whoever reaches that port can run code in the cluster"
    return Finding("fault", "token", text, fix)
