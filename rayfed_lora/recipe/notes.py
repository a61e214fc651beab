"""Keys of a recipe that have no effect, because of others: told to the user, not refused.

A key counts where the user has asked for it (`Recipe.asked`), and where its value is another one
than a recipe of the same method has anyway. Of a resolved recipe, in which every key is written,
nobody knows what was asked for: nothing is told.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.endpoints import strangers_in
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.presets import filled
from rayfed_lora.recipe.recipe import Recipe

# Why, and the keys that have no effect then; one that ends in a dot is a whole section.
_Reason = tuple[str, tuple[str, ...]]
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


def unused(recipe: Recipe) -> tuple[str, ...]:
    """Return what of a recipe will not be done as it is written, one line each."""
    notes = [*recipe.overruled, *_without_credentials(recipe)]
    left = _chosen(recipe)
    for why, keys in _reasons(recipe):
        idle = [key for key in left if any(_covers(each, key) for each in keys)]
        left = [key for key in left if key not in idle]
        if idle:
            notes.append(f"no effect with {why}: {', '.join(idle)}")
    if "clients.ranks" in left:
        notes += _spare_ranks(recipe)
    return tuple(notes)


def given_way_in_comparison(recipe: Recipe, seeds: Sequence[int]) -> Iterator[str]:
    """Yield which keys of a recipe a comparison has values of its own for."""
    if recipe.seed != 0 and recipe.seed not in seeds:
        yield f"seed {recipe.seed} of the recipe gives way to the seeds of the comparison"
    if recipe.storage.path is not None:
        yield "storage.path has no effect in a comparison: its runs are kept in folders of its own"


def given_way_in_search(recipe: Recipe) -> Iterator[str]:
    """Yield which keys of a recipe a search has values of its own for."""
    if recipe.storage.path is not None:
        yield "storage.path has no effect in a search: its trials are kept in folders of its own"
    if recipe.storage.checkpoint_every != 1:
        yield "storage.checkpoint_every has no effect in a search: every round is saved"
    if recipe.runtime.executor != "ray":
        yield "runtime.executor has no effect in a search, which runs on Ray"


def _covers(key: str, other: str) -> bool:
    return other.startswith(key) if key.endswith(".") else other == key


def _without_credentials(recipe: Recipe) -> Iterator[str]:
    for key, server in strangers_in(recipe.model_dump()):
        yield (
            f"{key} names the object store {server}: requests to it carry no credentials, since"
            " only the recipe names it"
        )


def _chosen(recipe: Recipe) -> list[str]:
    """Return the keys with values of the user's choice, as far as values tell."""
    given = {
        "method": recipe.method,
        "model": {"task": recipe.model.task},
        "clients": {"optimizer": {"name": recipe.clients.optimizer.name}},
    }
    chosen = [key for key, value, usual in _values(recipe, filled(given)) if value != usual]
    asked = recipe.asked
    if asked is None:
        return chosen
    return [key for key in chosen if any(f"{key}.".startswith(f"{path}.") for path in asked)]


def _values(section: BaseModel, usual: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key with its value and its usual one."""
    known = usual if isinstance(usual, Mapping) else {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        whole = field.is_required() or field.default_factory is not None
        if whole and isinstance(value, BaseModel):
            yield from _values(value, known.get(name), f"{path}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            # A preset's null stands for the default.
            yield f"{path}{name}", value, known.get(name, default)


def _reasons(recipe: Recipe) -> Iterator[_Reason]:
    """Yield every reason that holds, with the keys that have no effect for it."""
    annealing = recipe.annealing
    if annealing.mode == "full":
        keys = ("annealing.heating.rank", "adapter.train_head", "adapter.train_biases")
        yield "annealing.mode full", (*_STAGED_ONLY, *_FACTORS, "aggregation.rule", *keys)
    elif annealing.mode == "fixed":
        own = ("annealing.initiating.proximal_weight", "annealing.initiating.lr")
        yield "annealing.mode fixed", (*_STAGED_ONLY, *own)
    else:
        yield from _of_stages(annealing)
    if annealing.mode != "full" and annealing.heating.rank == 0:
        yield "annealing.heating.rank 0", _FACTORS
    yield from _of_ranks(recipe)
    yield from _of_cohort(recipe)
    yield from _of_optimizers(recipe)
    yield from _of_data(recipe)
    yield from _of_runtime(recipe)
    if recipe.evaluation.client_fraction == 0:
        yield "evaluation.client_fraction 0", ("evaluation.clients",)


def _of_stages(annealing: Annealing) -> Iterator[_Reason]:
    heating, cooling = annealing.heating, annealing.cooling
    initiating = tuple(f"annealing.initiating.{key}" for key in ("proximal_weight", "lr"))
    if annealing.initiating.trainable == "none":
        rounds = ("annealing.initiating.rounds",) * (annealing.initiating.rounds > 0)
        yield "annealing.initiating.trainable none", (*initiating, *rounds)
    elif annealing.initiating.rounds == 0:
        keys = (*initiating, "annealing.initiating.trainable")
        yield "annealing.initiating.rounds 0", keys
    ramps = heating.shape == "ramp" and heating.rounds > 0
    # The adapter of the first rounds has R0, and is cut where a ramp begins.
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


def _of_ranks(recipe: Recipe) -> Iterator[_Reason]:
    ranks, rank = recipe.clients.ranks, recipe.annealing.heating.rank
    smallest = min([ranks] if isinstance(ranks, int) else ranks or [0])
    if recipe.annealing.mode != "full" and smallest >= rank:
        yield f"annealing.heating.rank {rank}, which no client's limit is below", ("clients.ranks",)
    stacks = RULES[recipe.aggregation.rule].restarts
    if recipe.annealing.mode == "staged" and stacks:
        why = (
            f"aggregation.rule {recipe.aggregation.rule}, which begins each round with new factors"
        )
        yield why, ("annealing.cooling.residual",)


def _spare_ranks(recipe: Recipe) -> Iterator[str]:
    ranks, partition = recipe.clients.ranks, recipe.data.partition
    if isinstance(ranks, list) and partition.kind != "column" and len(ranks) > partition.clients:
        spare = len(ranks) - partition.clients
        yield (
            f"the last {spare} of the {len(ranks)} ranks of clients.ranks have no effect: there are"
            f" {partition.clients} clients"
        )


def _of_cohort(recipe: Recipe) -> Iterator[_Reason]:
    clients = recipe.data.partition.clients
    known = recipe.data.partition.kind != "column"
    if known and recipe.drawn(clients) == recipe.cohort_size(clients):
        yield "clients.per_round all clients there are", ("clients.over_select",)


def _of_optimizers(recipe: Recipe) -> Iterator[_Reason]:
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
            f"clients.lr_schedule.warmup_rounds {schedule.warmup_rounds}, all rounds there are",
            keys,
        )


def _of_data(recipe: Recipe) -> Iterator[_Reason]:
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


def _of_runtime(recipe: Recipe) -> Iterator[_Reason]:
    runtime = recipe.runtime
    # None on a GPU goes with a device that has none.
    gpus = () if runtime.gpus_per_actor == 0 else ("runtime.gpus_per_actor",)
    if runtime.executor == "local":
        keys = ("start_timeout_s", "scale_up_s", "block_timeout_s")
        yield "runtime.executor local", (*(f"runtime.{key}" for key in keys), *gpus)
    if runtime.device == "cpu":
        yield "runtime.device cpu", gpus
