"""The GPU memory of a recipe's actor, measured by a short run. Source: this project."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayfed_lora.doctor.findings import Finding
from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.engines.on_ray.placement import Node, layout
from rayfed_lora.errors import BadInputError, RayfedError, ResourceError
from rayfed_lora.federation.sampling import block_size
from rayfed_lora.launching.local import local_engine
from rayfed_lora.launching.planning import plan
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder

_STEPS = 2
_PROBE_S = 600.0


@dataclass(frozen=True)
class Probe:
    """The memory of a short run on a GPU share.

    Attributes:
        recipe: its name.
        gpus: the share, in GPUs.
        peak_mb: peak memory; 0 if the process had no GPU.
        total_mb: of the GPU.
        error: why the run failed, else "".
    """

    recipe: str
    gpus: float
    peak_mb: float = 0.0
    total_mb: float = 0.0
    error: str = ""


def shortened(recipe: Recipe, block: int) -> Recipe:
    """Return a recipe of one full-model round, if the recipe has one, and one at the heating rank.

    Args:
        recipe: the run.
        block: number of clients that are trained together.
    """
    full = recipe.annealing.mode == "full"
    changes = {
        "annealing.initiating.rounds": min(recipe.annealing.initiating.rounds, int(not full)),
        "annealing.heating.rounds": 1,
        "annealing.cooling.rounds": 0,
        "annealing.holding.rounds": 0,
        "annealing.acceptance": "always",
        # Every sampled client is trained.
        "clients.availability": 0.0,
        "clients.deadline_s": None,
        "clients.over_select": 1.0,
        "clients.per_round": block,
        "clients.local_steps": _STEPS,
        "clients.local_epochs": None,
        "evaluation.client_fraction": 0.0,
        "evaluation.clients_every": None,
        "runtime.cohort_size": block,
        "runtime.executor": "local",
        "runtime.client_actors": 1,
        "storage.path": None,
        # A probe is not tracked.
        "tracking.tensorboard": False,
        "tracking.wandb": None,
        "tracking.mlflow": None,
    }
    return load_recipe(recipe, changes)


def probe(recipe: Recipe, gpus: float, factory: Factory) -> Probe:
    """Run a shortened recipe, tests included, on this worker's GPU share and measure its memory.

    Args:
        recipe: from `shortened`.
        gpus: the share, which limits the memory of torch.
        factory: builds workload and trainer.
    """
    from rayfed_lora.training.device import device_of_share, peak_mb, total_mb

    device = device_of_share(gpus)
    executor = local_engine(recipe, factory, device)
    board = StatusBoard(recipe.annealing.total_rounds)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder, "run"))
            simulate(recipe, executor, run, board, lambda: False, resume=False)
    except RayfedError as error:
        return Probe(recipe.name, gpus, error=str(error).strip().splitlines()[-1])
    if device == "cpu":
        return Probe(recipe.name, gpus)
    return Probe(recipe.name, gpus, peak_mb(), total_mb())


def judge(found: Probe) -> Finding:
    """Return whether a share is large enough."""
    subject = f"GPU memory of {found.recipe}"
    if found.error:
        text = f"the probe on {found.gpus:g} GPU failed: {found.error}"
        fix = "raise runtime.gpus_per_actor, or lower runtime.cohort_size or clients.batch_size"
        return Finding("fault", subject, text, fix)
    if found.total_mb == 0:
        return Finding("skipped", subject, "the worker of the share has no GPU")
    share = min(found.gpus, 1.0) * found.total_mb
    text = (
        f"a full-model round, if it has one, a round at the heating rank and a test took"
        f" {found.peak_mb / 1e3:.2f} GB of the {share / 1e3:.2f} GB of {found.gpus:g} GPU"
    )
    return Finding("ok", subject, text)


def check_gpu_memory(recipes: Sequence[Recipe], nodes: Sequence[Node]) -> list[Finding]:
    """Probe recipes one after another, each on the GPU share of one of its actors."""
    if not any(node.gpus for node in nodes):
        return [Finding("skipped", "GPU memory", "no GPU in the cluster, nothing was probed")]
    return [_probed(recipe, nodes) for recipe in recipes]


def _probed(recipe: Recipe, nodes: Sequence[Node]) -> Finding:
    import ray

    from rayfed_lora.doctor.node_checks import Unanswered, answers

    subject = f"GPU memory of {recipe.name}"
    try:
        gpus = layout(recipe.runtime, nodes, 1).gpus
        if gpus == 0:
            return Finding("skipped", subject, "its actors use no GPU")
        planned = plan(recipe)
        cohort = max(each.clients for each in planned.rounds)
        block = block_size(recipe, planned.outline.shape, cohort, "cuda").clients
        short = shortened(recipe, min(block, cohort))
    except ResourceError:
        return Finding("skipped", subject, "none of its actors fits")
    except BadInputError as error:
        return Finding("skipped", subject, str(error))
    # In its own process, which frees all memory at its end.
    options = {"num_cpus": 0, "num_gpus": gpus, "max_retries": 0, "max_calls": 1}
    task = ray.remote(probe).options(**options)
    (answer,) = answers([task.remote(short, gpus, TorchFactory())], _PROBE_S)
    if isinstance(answer, Unanswered):
        answer = Probe(recipe.name, gpus, error=answer.reason)
    return judge(answer)
