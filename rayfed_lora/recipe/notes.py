"""Notes on a recipe: settings of the user that have no effect. They are no errors.

A note names keys that the user set (`Recipe.asked`) and whose value differs from the default of the
recipe's method. A resolved recipe, in which every key is written, gets no such notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.endpoints import strangers_in
from rayfed_lora.plugins.tables import PARTITIONS
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.presets import filled
from rayfed_lora.recipe.recipe import Recipe

# The reason, and the keys that have no effect for it; a trailing dot stands for a whole section.
_Reason = tuple[str, tuple[str, ...]]


def _keys(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


_TEMPERATURE = _keys("annealing", "temperature", "temperature_decay")
_TARGET = ("annealing.target.",)
_ACCEPTANCE = ("annealing.acceptance", *_TEMPERATURE, *_TARGET)
_INITIATING = _keys("annealing.initiating", "proximal_weight", "lr")
_STAGED_ONLY = (
    "annealing.heating.shape",
    *_keys("annealing.cooling", "rank", "shape", "steps", "residual"),
    *_ACCEPTANCE,
)
_FACTORS = (
    *_keys("adapter", "target_modules", "alpha", "dropout", "scaling"),
    "annealing.allocation",
    "clients.ranks",
)
_ADAM = _keys("aggregation.server_optimizer", "beta1", "beta2", "tau")


def unused(recipe: Recipe) -> tuple[str, ...]:
    """Return a line for each setting of a recipe that will not be applied as written."""
    notes = [*recipe.overruled, *_without_credentials(recipe), *_untested(recipe)]
    left = _chosen(recipe)
    for reason, keys in _idle_keys(recipe):
        sections = tuple(key for key in keys if key.endswith("."))
        idle = [key for key in left if key in keys or key.startswith(sections)]
        left = [key for key in left if key not in idle]
        if idle:
            notes.append(f"no effect with {reason}: {', '.join(idle)}")
    if "clients.ranks" in left:
        notes += _spare_ranks(recipe)
    return tuple(notes)


def _untested(recipe: Recipe) -> Iterator[str]:
    rule = recipe.aggregation.rule
    if RULES[rule].alone and recipe.evaluation.client_fraction == 0:
        yield (
            f"aggregation.rule {rule} trains no global model, and the clients' own models are not"
            " tested: set evaluation.client_fraction above 0"
        )


def given_way_in_comparison(recipe: Recipe, seeds: Sequence[int]) -> Iterator[str]:
    """Yield a line for each key of a recipe that a comparison overrules."""
    if recipe.seed != 0 and recipe.seed not in seeds:
        yield f"seed {recipe.seed} of the recipe gives way to the seeds of the comparison"
    if recipe.storage.path is not None:
        yield "storage.path has no effect in a comparison: each run has a folder of its own"


def given_way_in_search(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each key of a recipe that a search overrules."""
    if recipe.storage.path is not None:
        yield "storage.path has no effect in a search: each trial has a folder of its own"
    if recipe.storage.checkpoint_every != 1:
        yield "storage.checkpoint_every has no effect in a search: every round is saved"
    if recipe.runtime.executor != "ray":
        yield "runtime.executor has no effect in a search, which runs on Ray"


def _without_credentials(recipe: Recipe) -> Iterator[str]:
    for key, server in strangers_in(recipe.model_dump()):
        yield (
            f"{key} names the object store {server}: requests to it carry no credentials, since"
            " only the recipe names it"
        )


def _chosen(recipe: Recipe) -> list[str]:
    """Return the keys that the user set to a value other than the default."""
    given = {
        "method": recipe.method,
        "model": {"task": recipe.model.task},
        "clients": {"optimizer": {"name": recipe.clients.optimizer.name}},
    }
    chosen = [key for key, value, usual in _values(recipe, filled(given)) if value != usual]
    if recipe.asked is None:
        return chosen
    asked = tuple(f"{path}." for path in recipe.asked)
    return [key for key in chosen if f"{key}.".startswith(asked)]


def _values(section: BaseModel, usual: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key with its value and its usual one under the recipe's method."""
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


def _spare_ranks(recipe: Recipe) -> Iterator[str]:
    ranks, partition = recipe.clients.ranks, recipe.data.partition
    if isinstance(ranks, list) and partition.kind != "column" and len(ranks) > partition.clients:
        spare = len(ranks) - partition.clients
        yield (
            f"the last {spare} of the {len(ranks)} ranks of clients.ranks have no effect: there are"
            f" {partition.clients} clients"
        )


def _idle_keys(recipe: Recipe) -> Iterator[_Reason]:
    """Yield each reason that holds, with the keys that have no effect for it."""
    annealing = recipe.annealing
    if annealing.mode == "full":
        keys = ("annealing.heating.rank", "adapter.train_head", "adapter.train_biases")
        yield "annealing.mode full", (*_STAGED_ONLY, *_FACTORS, "aggregation.rule", *keys)
    elif annealing.mode == "fixed":
        yield "annealing.mode fixed", (*_STAGED_ONLY, *_INITIATING)
    else:
        yield from _idle_by_stages(annealing)
    if annealing.mode != "full" and annealing.heating.rank == 0:
        yield "annealing.heating.rank 0", _FACTORS
    yield from _idle_by_cohort(recipe)
    yield from _idle_by_optimizers(recipe)
    yield from _idle_by_data(recipe)
    yield from _idle_by_runtime(recipe)
    if recipe.evaluation.client_fraction == 0:
        yield "evaluation.client_fraction 0", ("evaluation.clients",)


def _idle_by_stages(annealing: Annealing) -> Iterator[_Reason]:
    initiating, heating, cooling = annealing.initiating, annealing.heating, annealing.cooling
    if initiating.trainable == "none":
        rounds = ("annealing.initiating.rounds",) * (initiating.rounds > 0)
        yield "annealing.initiating.trainable none", (*_INITIATING, *rounds)
    elif initiating.rounds == 0:
        yield "annealing.initiating.rounds 0", (*_INITIATING, "annealing.initiating.trainable")
    # The initiating stage trains the adapter at rank R0; a ramp cuts it.
    adapter_first = annealing.initiating_rounds > 0 and initiating.trainable == "adapter"
    residual = ("annealing.cooling.residual",) * (not (heating.ramps and adapter_first))
    rank = ("annealing.cooling.rank",) * (not heating.ramps)
    if heating.rounds == 0:
        yield "annealing.heating.rounds 0", ("annealing.heating.shape",)
    if cooling.rounds == 0:
        shape = ("annealing.cooling.shape",) * (annealing.holding.rounds == 0)
        rest = () if annealing.cools else (*rank, *residual, *_ACCEPTANCE)
        yield "annealing.cooling.rounds 0", ("annealing.cooling.steps", *shape, *rest)
    if cooling.shape == "constant":
        yield "annealing.cooling.shape constant", (*rank, *residual, *_ACCEPTANCE)
    if cooling.shape != "step":
        yield f"annealing.cooling.shape {cooling.shape}", ("annealing.cooling.steps",)
    accepts = annealing.accepts.name
    if annealing.feedback != "energies":
        yield f"annealing.acceptance {accepts}", _TEMPERATURE
    if annealing.feedback != "metric":
        yield f"annealing.acceptance {accepts}", _TARGET


def _idle_by_cohort(recipe: Recipe) -> Iterator[_Reason]:
    lowest, rank = recipe.clients.lowest_rank, recipe.annealing.heating.rank
    if recipe.annealing.mode != "full" and lowest is not None and lowest >= rank:
        yield f"annealing.heating.rank {rank}, within the limit of every client", ("clients.ranks",)
    rule = recipe.aggregation.rule
    if recipe.annealing.mode == "staged" and RULES[rule].restarts:
        reason = f"aggregation.rule {rule}, which starts each round with new factors"
        yield reason, ("annealing.cooling.residual",)
    clients = recipe.data.partition.clients
    known = recipe.data.partition.kind != "column"
    if known and recipe.drawn(clients) == recipe.cohort_size(clients):
        yield "clients.per_round covering all clients", ("clients.over_select",)


def _idle_by_optimizers(recipe: Recipe) -> Iterator[_Reason]:
    server, local = recipe.aggregation.server_optimizer.name, recipe.clients.optimizer.name
    momentum = ("aggregation.server_optimizer.momentum",)
    idle = {"sgd": (*_ADAM, *momentum), "momentum": _ADAM}.get(server, momentum)
    yield f"aggregation.server_optimizer.name {server}", idle
    if local not in ("sgd", "rmsprop"):
        yield f"clients.optimizer.name {local}", ("clients.optimizer.momentum",)
    schedule = recipe.clients.lr_schedule
    if schedule.shape == "constant":
        keys = _keys("clients.lr_schedule", "final_factor", "horizon")
        yield "clients.lr_schedule.shape constant", keys
    if schedule.warmup_rounds >= recipe.annealing.total_rounds:
        warmup = f"clients.lr_schedule.warmup_rounds {schedule.warmup_rounds}"
        keys = _keys("clients.lr_schedule", "shape", "final_factor")
        yield f"{warmup}, which covers all rounds", keys


def _idle_by_data(recipe: Recipe) -> Iterator[_Reason]:
    kind, task = recipe.data.partition.kind, recipe.model.task
    read = (
        {"column"}
        if kind == "column"
        else {"clients", *PARTITIONS.method(kind).options.model_fields}
    )
    keys = ("alpha", "min_examples", "shards_per_client", "column", "clients")
    idle = (name for name in keys if name not in read)
    yield f"data.partition.kind {kind}", _keys("data.partition", *idle)
    if recipe.data.test_source is not None:
        yield "data.test_source", ("data.test_fraction",)
    texts = ("data.text_column", "data.max_length", "model.tokenizer")
    images = ("data.image_column", "data.resize")
    turns = ("data.template", "data.loss_on")
    if task != "causal-lm":
        yield f"model.task {task}", turns
    elif recipe.data.format.kind == "text":
        yield "data.format text", turns
    yield f"model.task {task}", texts if task == "image-classification" else images


def _idle_by_runtime(recipe: Recipe) -> Iterator[_Reason]:
    runtime = recipe.runtime
    # `gpus_per_actor: 0` does not contradict a run without GPUs.
    gpus = ("runtime.gpus_per_actor",) * (runtime.gpus_per_actor != 0)
    if runtime.executor == "local":
        keys = _keys("runtime", "start_timeout_s", "scale_up_s", "block_timeout_s")
        yield "runtime.executor local", (*keys, *gpus)
    if runtime.device == "cpu":
        yield "runtime.device cpu", gpus
