"""What a recipe will do and send, before anything is trained. Needs no Ray and no weights.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.annealing import budget
from rayfed_lora.annealing.stages import Feedback, adapter_rounds_before, plan_round
from rayfed_lora.federation import sampling
from rayfed_lora.federation.devices import Devices
from rayfed_lora.federation.learning_rate import doubt, learning_rate
from rayfed_lora.federation.ledger import BYTES_A_VALUE, Ledger, Totals
from rayfed_lora.federation.sampling import block_size
from rayfed_lora.federation.traffic import Counts, RoundFacts, is_cut
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import Outline, outline
from rayfed_lora.types import Device, Frozen, ModelShape, RoundPlan, Stage, Trainable

# Resident memory of a Python process with torch, peft and transformers loaded, measured.
_PROCESS_MB = 303


@dataclass(frozen=True)
class PlannedRound:
    """One round as it is scheduled.

    Attributes:
        round: index from 0.
        stage: stage of the schedule.
        trainable: `full` or `adapter`.
        rank: uniform rank; None in a full-model round.
        trainable_params: number of values that a client trains.
        learning_rate: local learning rate.
        clients: size of the cohort.
        arriving: how many of them arrive in time, by the simulated clock.
        bytes_up, bytes_down, bytes_base: of the whole cohort.
        simulated_s: length of the round by the simulated clock; None where no time is simulated.
    """

    round: int
    stage: Stage
    trainable: Trainable
    rank: int | None
    trainable_params: int
    learning_rate: float
    clients: int
    arriving: int
    bytes_up: int
    bytes_down: int
    bytes_base: int
    simulated_s: float | None


@dataclass(frozen=True)
class Plan:
    """A recipe's schedule and bill.

    Attributes:
        rounds: every round; with an acceptance rule, as if each proposal were accepted; with
            spectral allocation, the upper bound that the uniform rank sets.
        totals: the ledger's, if every update arrives but those that leave or are late by the
            simulated clock.
        outline: sizes of data and model.
        needs: what it needs of the cluster, one line each.
        actor_mb: memory of an actor, without activations.
        notes: what the user should know before the run, e.g. of a learning rate that is probably
            not meant, one line each.
    """

    rounds: tuple[PlannedRound, ...]
    totals: Totals
    outline: Outline
    needs: tuple[str, ...]
    actor_mb: float
    notes: tuple[str, ...] = ()


def plan(recipe: Recipe | str | Path | Mapping[str, Any]) -> Plan:
    """Return the plan of a recipe; reads its data and its model's configuration.

    Args:
        recipe: from `load_recipe`, or what it takes: a shipped name, a path or a mapping.

    Raises:
        DataError: the data cannot be read or dealt as asked.
        ModelError: the model or its adapter does not fit.
    """
    recipe = load_recipe(recipe)
    sizes = outline(recipe)
    ledger = Ledger(sizes.shape, len(sizes.devices.sizes), RULES[recipe.aggregation.rule])
    devices = Devices(recipe, sizes.devices) if recipe.simulates_time else None
    limits = sampling.rank_limits(recipe, len(sizes.devices.sizes))
    annealing = _without_feedback(recipe)
    rounds: list[PlannedRound] = []
    rank: int | None = None
    clock_s = 0.0
    for t in range(recipe.annealing.total_rounds):
        scheduled = plan_round(annealing, t, Feedback(rank=rank))
        planned = _planned(recipe, sizes, ledger, scheduled, rank, limits, devices, clock_s)
        rounds.append(planned)
        clock_s += planned.simulated_s or 0.0
        rank = None if scheduled.trainable == "full" else scheduled.rank
    needs = _needs(recipe, sizes, rounds)
    actor_mb = _PROCESS_MB + _training_mb(sizes, rounds)
    doubtful = doubt(recipe)
    notes = (*sizes.notes, *unused(recipe), *([] if doubtful is None else [doubtful]))
    return Plan(tuple(rounds), ledger.totals, sizes, needs, actor_mb, notes)


def _without_feedback(recipe: Recipe) -> Annealing:
    return recipe.annealing.model_copy(update={"acceptance": "always"})


def _planned(  # noqa: PLR0913, PLR0917 - the one caller has them all
    recipe: Recipe,
    sizes: Outline,
    ledger: Ledger,
    scheduled: RoundPlan,
    rank_before: int | None,
    limits: Counts | None,
    devices: Devices | None,
    clock_s: float,
) -> PlannedRound:
    shape, clients = sizes.shape, len(sizes.devices.sizes)
    full = scheduled.trainable == "full"
    if devices is None:
        cohort, began = sampling.cohort(recipe, clients, scheduled.round), clock_s
    else:
        cohort, began = devices.cohort(scheduled.round, clock_s)
    facts = _facts(recipe, shape, scheduled, rank_before, cohort, limits)
    simulated_s = None
    if devices is not None:
        turnout = devices.turnout(scheduled.round, cohort, ledger.quote(facts), full, began)
        facts = replace(facts, arrived=~turnout.sent.absent, sent=turnout.sent)
        simulated_s = began + turnout.length_s - clock_s
    bill = ledger.book(facts)
    return PlannedRound(
        round=scheduled.round,
        stage=scheduled.stage,
        trainable=scheduled.trainable,
        rank=None if full else scheduled.rank,
        trainable_params=_trained(shape, facts.ranks, facts.frozen, full),
        learning_rate=learning_rate(recipe, scheduled.round),
        clients=len(cohort),
        arriving=bill.arrived,
        bytes_up=bill.params_up * BYTES_A_VALUE,
        bytes_down=bill.params_down * BYTES_A_VALUE,
        bytes_base=bill.base_params * BYTES_A_VALUE,
        simulated_s=simulated_s,
    )


def _facts(
    recipe: Recipe,
    shape: ModelShape,
    scheduled: RoundPlan,
    rank_before: int | None,
    cohort: tuple[int, ...],
    limits: Counts | None,
) -> RoundFacts:
    """Return what decides a round's messages if all arrive."""
    full = scheduled.trainable == "full"
    ranks = {} if full else budget.uniform(shape.modules, scheduled.rank)
    anew = RULES[recipe.aggregation.rule].merges == "stack"
    kept = None if anew else rank_before
    before = {} if kept is None else budget.uniform(shape.modules, kept)
    turn = adapter_rounds_before(recipe.annealing, scheduled.round)
    folded = _folded(recipe, shape, before, ranks)
    return RoundFacts(
        trainable=scheduled.trainable,
        cohort=cohort,
        arrived=np.ones(len(cohort), bool),
        ranks=ranks,
        limits=None if limits is None else limits[list(cohort)],
        frozen=None if full else RULES[recipe.aggregation.rule].frozen(turn),
        ranks_before=before if folded else None,
        folded=folded,
        resized=is_cut(before, ranks),
        stepped=recipe.aggregation.server_optimizer.lr != 1.0,
        after_initiating=scheduled.stage != "initiating",
    )


def _trained(shape: ModelShape, ranks: Mapping[str, int], frozen: Frozen | None, full: bool) -> int:
    if full:
        return shape.total_params
    sides = {
        name: module.d_in * (frozen != "a") + module.d_out * (frozen != "b")
        for name, module in shape.modules.items()
    }
    return shape.head_params + sum(sides[name] * rank for name, rank in ranks.items())


def _folded(
    recipe: Recipe, shape: ModelShape, before: Mapping[str, int], ranks: Mapping[str, int]
) -> int:
    """Return the number of values that a shrink folds into the base."""
    if recipe.annealing.cooling.residual == "drop" or not before:
        return 0
    cut = {name: before[name] - ranks[name] for name in ranks if before[name] > ranks[name]}
    return budget.cost({name: shape.modules[name] for name in cut}, cut)


def _needs(recipe: Recipe, sizes: Outline, rounds: list[PlannedRound]) -> tuple[str, ...]:
    runtime = recipe.runtime
    actors = runtime.client_actors
    most = max(planned.clients for planned in rounds)
    count = f"1 to {most} (auto)" if actors == "auto" else str(actors)
    gpus = runtime.gpus_per_actor
    share = "1 GPU" if gpus == "auto" else f"{gpus:g} GPU"
    gpu = "" if runtime.device == "cpu" or gpus == 0 else f" and {share} where the cluster has GPUs"
    where, trainers = f"client actors: {count}", runtime.trainers_per_actor
    if runtime.executor == "local":
        threads = 1 if actors == "auto" or runtime.device == "cuda" else actors * trainers
        where = "this process" if threads == 1 else f"this process, up to {threads} threads"
    full = any(planned.trainable == "full" for planned in rounds)
    training_mb = _training_mb(sizes, rounds)
    several = runtime.executor == "ray" and runtime.device != "cuda" and trainers > 1
    at_once = f"; on CPUs each trains {trainers} blocks at once" if several else ""
    return (
        f"{where}, each {runtime.cpus_per_actor:g} CPU{gpu}{at_once}",
        *_blocks(recipe, sizes, rounds),
        f"memory: about {_PROCESS_MB + training_mb:.0f} MB an actor"
        f" ({_PROCESS_MB} MB of Python and torch, {training_mb:.0f} MB of model"
        f"{', gradients and optimiser state' if full else ''}), without activations",
    )


def _training_mb(sizes: Outline, rounds: list[PlannedRound]) -> float:
    """Return the memory of model, gradients and optimiser state."""
    full = any(planned.trainable == "full" for planned in rounds)
    return sizes.shape.total_params * BYTES_A_VALUE / 1e6 * (4 if full else 1)


def _blocks(recipe: Recipe, sizes: Outline, rounds: list[PlannedRound]) -> Iterator[str]:
    """Say how many clients are trained together, on each kind of device that may be used."""
    cohort = next((planned.clients for planned in rounds if planned.trainable == "adapter"), None)
    if cohort is None:
        return
    runtime = recipe.runtime
    on_gpus = runtime.device != "cpu" and runtime.gpus_per_actor != 0
    devices: list[Device] = ["cpu"] if runtime.device != "cuda" else []
    if on_gpus and runtime.executor == "ray":
        devices.append("cuda")
    sizes_by_device = [block_size(recipe, sizes.shape, cohort, device) for device in devices]
    for reason in dict.fromkeys(size.reason for size in sizes_by_device):
        yield f"trained together: {reason}"
