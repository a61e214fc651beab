"""Checks of recipes: room for their actors, data and model, and their GPU memory by a short run.

Source: this project.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed_lora.data.client_numbers import ClientSettings
from rayfed_lora.diagnosis.findings import Finding
from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.engines.on_ray.placement import Node, layout, nodes_of, wanted
from rayfed_lora.errors import BadInputError, RayfedError, ResourceError
from rayfed_lora.federation.sampling import block_size
from rayfed_lora.launching.planning import plan
from rayfed_lora.launching.this_process import local_engine
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder

_PROBE_S = 600.0
# Changes of a recipe for its probe; every sampled client is trained, and nothing is tracked.
_SHORTENED: dict[str, Any] = {
    "annealing.heating.rounds": 1,
    "annealing.cooling.rounds": 0,
    "annealing.holding.rounds": 0,
    "annealing.acceptance": "always",
    "clients.availability": 0.0,
    "clients.deadline_s": None,
    "clients.over_select": 1.0,
    "clients.local_steps": 2,
    "clients.local_epochs": None,
    "evaluation.client_fraction": 0.0,
    "evaluation.clients_every": None,
    "runtime.executor": "local",
    "runtime.client_actors": 1,
    "storage.path": None,
    "tracking.tensorboard": False,
    "tracking.wandb": None,
    "tracking.mlflow": None,
}


def check_recipes(
    recipes: Sequence[Recipe], shipped: bool, ray_nodes: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Return how many actors of each recipe fit `ray.nodes()`, and the memory that they need.

    For shipped recipes, which the user did not name, missing data are a warning, not a fault.
    """
    nodes = nodes_of(ray_nodes)
    memory = [float(node["Resources"].get("memory", 0.0)) / 1e6 for node in ray_nodes]
    return [_fit(recipe, shipped, nodes, memory) for recipe in recipes]


def _fit(recipe: Recipe, shipped: bool, nodes: Sequence[Node], memory: Sequence[float]) -> Finding:
    subject, runtime = f"recipe {recipe.name}", recipe.runtime
    try:
        actor_mb = plan(recipe).actor_mb
        if runtime.scale_up_s is not None:
            actors = wanted(runtime)
            text = (
                f"waits for nodes with {actors.actors} times {actors.cpus:g} CPU and"
                f" {actors.gpus:g} GPU (runtime.scale_up_s)"
            )
            return Finding("ok", subject, text)
        actors = layout(runtime, nodes, recipe.cohort_size(recipe.data.partition.clients))
    except ResourceError as error:
        return Finding("fault", subject, str(error), "ask for less, or add nodes")
    except BadInputError as error:
        fix = "install what it names on every node, or name other data or another model"
        return Finding("warning" if shipped else "fault", subject, str(error), fix)
    share = f"{actors.cpus:g} CPU" + (f" and {actors.gpus:g} GPU" if actors.gpus else "")
    text = (
        f"{actors.actors} client actors of {share} fit, about {actor_mb / 1e3:.2f} GB of memory"
        " each, without activations"
    )
    # The memory that the actors take on each node, and the memory that Ray has there.
    for node, free_mb in zip(nodes, memory, strict=True):
        here = min(actors.actors, actors.most_on(node))
        if free_mb > 0 and here * actor_mb > free_mb:
            text += f"; {here} on one node need more than its {free_mb / 1e3:.1f} GB"
            fix = "lower runtime.client_actors, or raise cpus_per_actor or gpus_per_actor"
            return Finding("warning", subject, text, fix)
    return Finding("ok", subject, text)


def shortened(recipe: Recipe, block: int) -> Recipe:
    """Return a recipe of a full-model round, if any, and a heating round, of `block` clients."""
    initiating = min(recipe.annealing.initiating.rounds, int(recipe.annealing.mode != "full"))
    sizes = {"clients.per_round": block, "runtime.cohort_size": block}
    return load_recipe(recipe, {**_SHORTENED, **sizes, "annealing.initiating.rounds": initiating})


def probe(recipe: Recipe, gpus: float, factory: Factory) -> Finding:
    """Run a recipe, tests included, in `gpus` of this worker's GPU, and measure its memory."""
    from rayfed_lora.training.device import device_of_share, peak_mb, total_mb

    device = device_of_share(gpus)
    engine = local_engine(recipe, factory, device)
    board = StatusBoard(recipe.annealing.total_rounds)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder, "run"))
            simulate(recipe, engine, run, board, lambda: False, resume=False)
    except RayfedError as error:
        return failed_probe(recipe.name, gpus, str(error).strip().splitlines()[-1])
    if device == "cpu":
        return Finding("skipped", _subject(recipe.name), "the worker of the share has no GPU")
    return measured_probe(recipe.name, gpus, peak_mb("cuda:0"), total_mb())


def _subject(recipe: str) -> str:
    return f"GPU memory of {recipe}"


def measured_probe(recipe: str, gpus: float, peak_mb: float, total_mb: float) -> Finding:
    """Return the finding of a run that took `peak_mb` of a GPU with `total_mb`."""
    text = (
        f"a full-model round, if it has one, a round at the heating rank and a test took"
        f" {peak_mb / 1e3:.2f} GB of the {min(gpus, 1.0) * total_mb / 1e3:.2f} GB of {gpus:g} GPU"
    )
    return Finding("ok", _subject(recipe), text)


def failed_probe(recipe: str, gpus: float, reason: str) -> Finding:
    """Return the finding of a run that failed: its share may be too small."""
    text = f"the probe on {gpus:g} GPU failed: {reason}"
    fix = "raise runtime.gpus_per_actor, or lower runtime.cohort_size or clients.batch_size"
    return Finding("fault", _subject(recipe), text, fix)


def check_gpu_memory(recipes: Sequence[Recipe], nodes: Sequence[Node]) -> list[Finding]:
    """Probe recipes one after another, each on the GPU share of one of its actors."""
    if not any(node.gpus for node in nodes):
        return [Finding("skipped", "GPU memory", "no GPU in the cluster, nothing was probed")]
    return [_probed(recipe, nodes) for recipe in recipes]


def _probed(recipe: Recipe, nodes: Sequence[Node]) -> Finding:
    import ray

    from rayfed_lora.diagnosis.node_checks import Unanswered, answers

    subject = _subject(recipe.name)
    try:
        gpus = layout(recipe.runtime, nodes, 1).gpus
        if gpus == 0:
            return Finding("skipped", subject, "its actors use no GPU")
        planned = plan(recipe)
        cohort = max(each.clients for each in planned.rounds)
        batch = ClientSettings.of(recipe, planned.outline.devices).most_examples
        block = block_size(recipe, planned.outline.shape, cohort, "cuda", batch).clients
        short = shortened(recipe, min(block, cohort))
    except ResourceError:
        return Finding("skipped", subject, "none of its actors fits")
    except BadInputError as error:
        return Finding("skipped", subject, str(error))
    # In its own process, which frees all memory at its end.
    options = {"num_cpus": 0, "num_gpus": gpus, "max_retries": 0, "max_calls": 1}
    task = ray.remote(probe).options(**options)
    (found,) = answers([task.remote(short, gpus, TorchFactory())], _PROBE_S)
    if isinstance(found, Unanswered):
        return failed_probe(recipe.name, gpus, str(found))
    finding: Finding = found
    return finding
