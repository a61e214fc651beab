"""Keys that have no effect because of the values of other keys. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.settings import Settings

# The reason, and the keys that have no effect for it; a trailing dot stands for a whole section.
Reason = tuple[str, tuple[str, ...]]
_FEEDBACK = ("annealing.temperature", "annealing.temperature_decay", "annealing.target.")
_STAGED_ONLY = (
    "annealing.heating.shape",
    "annealing.cooling.rank",
    "annealing.cooling.shape",
    "annealing.cooling.steps",
    "annealing.cooling.residual",
    "annealing.acceptance",
    *_FEEDBACK,
)
_FACTORS = (
    "adapter.target_modules",
    "adapter.alpha",
    "adapter.dropout",
    "adapter.scaling",
    "annealing.allocation",
    "clients.ranks",
)
_ADAM = tuple(f"aggregation.server_optimizer.{name}" for name in ("beta1", "beta2", "tau"))


def idle_keys(recipe: Settings) -> Iterator[Reason]:
    """Yield each reason that holds, with the keys that have no effect for it."""
    annealing = recipe.annealing
    if annealing.mode == "full":
        keys = ("annealing.heating.rank", "adapter.train_head", "adapter.train_biases")
        yield "annealing.mode full", (*_STAGED_ONLY, *_FACTORS, "aggregation.rule", *keys)
    elif annealing.mode == "fixed":
        own = ("annealing.initiating.proximal_weight", "annealing.initiating.lr")
        yield "annealing.mode fixed", (*_STAGED_ONLY, *own)
    else:
        yield from _idle_by_stages(annealing)
    if annealing.mode != "full" and annealing.heating.rank == 0:
        yield "annealing.heating.rank 0", _FACTORS
    yield from _idle_by_ranks(recipe)
    yield from _idle_by_cohort(recipe)
    yield from _idle_by_optimizers(recipe)
    yield from _idle_by_data(recipe)
    yield from _idle_by_runtime(recipe)
    if recipe.evaluation.client_fraction == 0:
        yield "evaluation.client_fraction 0", ("evaluation.clients",)


def _idle_by_stages(annealing: Annealing) -> Iterator[Reason]:
    heating, cooling = annealing.heating, annealing.cooling
    initiating = tuple(f"annealing.initiating.{key}" for key in ("proximal_weight", "lr"))
    if annealing.initiating.trainable == "none":
        rounds = ("annealing.initiating.rounds",) * (annealing.initiating.rounds > 0)
        yield "annealing.initiating.trainable none", (*initiating, *rounds)
    elif annealing.initiating.rounds == 0:
        keys = (*initiating, "annealing.initiating.trainable")
        yield "annealing.initiating.rounds 0", keys
    ramps = heating.shape == "ramp" and heating.rounds > 0
    # The initiating stage trains the adapter at rank R0; a ramp cuts it.
    cut = ramps and annealing.initiating_rounds > 0 and annealing.initiating.trainable == "adapter"
    residual = () if cut else ("annealing.cooling.residual",)
    if heating.rounds == 0:
        yield "annealing.heating.rounds 0", ("annealing.heating.shape",)
    if cooling.rounds == 0:
        falls = annealing.holding.rounds > 0 and cooling.shape != "constant"
        shape = () if annealing.holding.rounds > 0 else ("annealing.cooling.shape",)
        rank = () if falls or ramps else ("annealing.cooling.rank",)
        keys = ("annealing.cooling.steps", *shape, *rank)
        rest = () if falls else (*residual, "annealing.acceptance", *_FEEDBACK)
        yield "annealing.cooling.rounds 0", (*keys, *rest)
    if cooling.shape == "constant":
        rank = () if ramps else ("annealing.cooling.rank",)
        idle = (*residual, "annealing.acceptance", *_FEEDBACK)
        yield "annealing.cooling.shape constant", (*rank, *idle)
    if cooling.shape != "step":
        yield f"annealing.cooling.shape {cooling.shape}", ("annealing.cooling.steps",)
    if annealing.acceptance != "metropolis":
        yield f"annealing.acceptance {annealing.acceptance}", _FEEDBACK[:2]
    if annealing.acceptance != "target":
        yield f"annealing.acceptance {annealing.acceptance}", _FEEDBACK[2:]


def _idle_by_ranks(recipe: Settings) -> Iterator[Reason]:
    lowest, rank = recipe.clients.lowest_rank, recipe.annealing.heating.rank
    if recipe.annealing.mode != "full" and lowest is not None and lowest >= rank:
        yield f"annealing.heating.rank {rank}, within the limit of every client", ("clients.ranks",)
    rule = recipe.aggregation.rule
    if recipe.annealing.mode == "staged" and RULES[rule].restarts:
        reason = f"aggregation.rule {rule}, which starts each round with new factors"
        yield reason, ("annealing.cooling.residual",)


def _idle_by_cohort(recipe: Settings) -> Iterator[Reason]:
    clients = recipe.data.partition.clients
    known = recipe.data.partition.kind != "column"
    if known and recipe.drawn(clients) == recipe.cohort_size(clients):
        yield "clients.per_round covering all clients", ("clients.over_select",)


def _idle_by_optimizers(recipe: Settings) -> Iterator[Reason]:
    server, schedule = recipe.aggregation.server_optimizer.name, recipe.clients.lr_schedule
    momentum = ("aggregation.server_optimizer.momentum",)
    idle = {"sgd": (*_ADAM, *momentum), "momentum": _ADAM}.get(server, momentum)
    yield f"aggregation.server_optimizer.name {server}", idle
    if recipe.clients.optimizer.name != "sgd":
        yield (
            f"clients.optimizer.name {recipe.clients.optimizer.name}",
            ("clients.optimizer.momentum",),
        )
    if schedule.shape == "constant":
        yield "clients.lr_schedule.shape constant", ("clients.lr_schedule.final_factor",)
    if schedule.warmup_rounds >= recipe.annealing.total_rounds:
        keys = ("clients.lr_schedule.shape", "clients.lr_schedule.final_factor")
        yield (
            f"clients.lr_schedule.warmup_rounds {schedule.warmup_rounds}, which covers all rounds",
            keys,
        )


def _idle_by_data(recipe: Settings) -> Iterator[Reason]:
    partition, task = recipe.data.partition, recipe.model.task
    key = "data.partition."
    readers = {
        "alpha": ("dirichlet", "quantity"),
        "min_examples": ("dirichlet", "quantity"),
        "shards_per_client": ("shards",),
        "column": ("column",),
        "clients": ("iid", "dirichlet", "shards", "quantity"),
    }
    idle = tuple(f"{key}{name}" for name, kinds in readers.items() if partition.kind not in kinds)
    yield f"{key}kind {partition.kind}", idle
    if task == "image-classification":
        keys = ("data.text_column", "data.max_length", "model.tokenizer")
        yield f"model.task {task}", keys
    else:
        yield f"model.task {task}", ("data.image_column",)


def _idle_by_runtime(recipe: Settings) -> Iterator[Reason]:
    runtime = recipe.runtime
    # `gpus_per_actor: 0` does not contradict a run without GPUs.
    gpus = () if runtime.gpus_per_actor == 0 else ("runtime.gpus_per_actor",)
    if runtime.executor == "local":
        keys = ("start_timeout_s", "scale_up_s", "block_timeout_s")
        yield "runtime.executor local", (*(f"runtime.{key}" for key in keys), *gpus)
    if runtime.device == "cpu":
        yield "runtime.device cpu", gpus
