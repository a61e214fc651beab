"""The plan of a run; needs neither Ray nor weights. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.annealing.stages import schedule
from rayfed_lora.data.client_numbers import ClientSettings
from rayfed_lora.federation.bills import Bill, Totals
from rayfed_lora.federation.cohorts import Cohort, Cohorts, new_ledger
from rayfed_lora.federation.learning_rate import learning_rate, rate_warning
from rayfed_lora.federation.privacy import Accountant, check_privacy
from rayfed_lora.federation.sampling import BlockSize, block_size
from rayfed_lora.federation.traffic import trained_values
from rayfed_lora.federation.transitions import planned
from rayfed_lora.launching.harness import check_recipes
from rayfed_lora.launching.in_memory import data_settings
from rayfed_lora.launching.memory_plan import ActorMemory, actor_memory
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import Outline, outline
from rayfed_lora.types import Device, ModelShape, RoundPlan, Stage, Trainable
from rayfed_lora.wire.update import BYTES_PER_VALUE

# Resident memory of a Python process with torch, peft and transformers loaded, measured.
_PROCESS_MB = 303


@dataclass(frozen=True)
class PlannedRound:
    """One round as it is scheduled.

    Attributes:
        round: index from 0.
        rank: uniform rank; None in a full-model round.
        trainable_params: number of values that a client trains.
        clients: size of the cohort.
        arriving: how many of them arrive in time, by the simulated clock.
        bytes_up, bytes_down, bytes_base: of the whole cohort.
        simulated_s: length of the round by the simulated clock; None where no time is simulated.
        epsilon: of client-level privacy up to this round; None without privacy.
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
    epsilon: float | None = None


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
        memory: of an actor in adapter rounds, on each kind of device that may be used; empty where
            there are none.
        notes: warnings to the user, e.g. of an implausible learning rate, one line each.
    """

    rounds: tuple[PlannedRound, ...]
    totals: Totals
    outline: Outline
    needs: tuple[str, ...]
    actor_mb: float
    notes: tuple[str, ...] = ()
    memory: tuple[ActorMemory, ...] = ()


def plan(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    plugins: Sequence[Any] = (),
    data: Any = None,
) -> Plan:
    """Return the plan of a recipe; reads its data and its model's configuration.

    `recipe` is a `Recipe`, a shipped name, a path or a mapping; `plugins` and `data` as for `run`.

    Raises:
        DataError: the data cannot be read or dealt as asked.
        ModelError: the model or its adapter does not fit.
        BadInputError: a task of `evaluation.harness` is not known here.
    """
    recipe = load_recipe(recipe, data_settings(data), plugins=plugins)
    check_privacy(recipe)
    check_recipes([recipe])
    sizes = outline(recipe)
    clients = len(sizes.devices.sizes)
    ledger = new_ledger(recipe, sizes.shape, clients)
    cohorts = Cohorts(recipe, sizes.devices, clients, ledger)
    settings = ClientSettings.of(recipe, sizes.devices)
    accountant = Accountant(recipe, clients)
    anew = RULES[recipe.aggregation.rule].restarts
    rounds: list[PlannedRound] = []
    rank, clock_s = None, 0.0
    for scheduled in schedule(recipe.annealing):
        resizing = planned(recipe, sizes.shape, None if anew else rank, scheduled)
        cohort = cohorts.draw(scheduled, resizing, clock_s)
        bill = ledger.book(cohort.facts)
        lr = learning_rate(recipe, scheduled.round, settings.mean_lr)
        found = _planned_round(lr, sizes.shape, scheduled, cohort, bill)
        rounds.append(replace(found, epsilon=accountant.epsilon(scheduled.round + 1)))
        clock_s, rank = cohort.clock_s, rounds[-1].rank
    full = any(planned.trainable == "full" for planned in rounds)
    # A full-model round adds gradients and two values of optimiser state.
    training_mb = sizes.shape.total_params * BYTES_PER_VALUE / 1e6 * (4 if full else 1)
    state = ", gradients and optimiser state" if full else ""
    needs = (
        _actors(recipe, rounds),
        *_blocks(recipe, sizes, rounds, settings.most_examples),
        *_own_settings(recipe, settings),
        f"memory: about {_PROCESS_MB + training_mb:.0f} MB an actor"
        f" ({_PROCESS_MB} MB of Python and torch, {training_mb:.0f} MB of model{state}),"
        " without activations",
        *([] if sizes.texts is None else [sizes.texts.line(recipe.data)]),
        *_privacy(recipe, accountant),
    )
    doubtful = rate_warning(recipe)
    notes = (*sizes.notes, *unused(recipe), *([] if doubtful is None else [doubtful]))
    return Plan(
        tuple(rounds),
        ledger.totals,
        sizes,
        needs,
        _PROCESS_MB + training_mb,
        notes,
        tuple(_memory(recipe, sizes, rounds, settings.most_examples)),
    )


def _privacy(recipe: Recipe, accountant: Accountant) -> Iterator[str]:
    """Yield the line about privacy, if the recipe asks for it."""
    if recipe.privacy is not None:
        total = accountant.epsilon(recipe.annealing.total_rounds)
        yield (
            f"privacy: epsilon {total:.3g} at delta {recipe.privacy.delta:g} after all rounds"
            f" ({accountant.statement}); clients count the same"
        )


def _planned_round(
    lr: float, shape: ModelShape, scheduled: RoundPlan, cohort: Cohort, bill: Bill
) -> PlannedRound:
    full, facts = scheduled.trainable == "full", cohort.facts
    return PlannedRound(
        round=scheduled.round,
        stage=scheduled.stage,
        trainable=scheduled.trainable,
        rank=None if full else scheduled.rank,
        trainable_params=trained_values(shape, facts),
        learning_rate=lr,
        clients=len(cohort.clients),
        arriving=bill.arrived,
        bytes_up=int(bill.sent_up.sum()),
        bytes_down=int(bill.sent_down.sum()),
        bytes_base=int(bill.sent_base.sum()),
        simulated_s=cohort.lasted_s,
    )


def _actors(recipe: Recipe, rounds: list[PlannedRound]) -> str:
    """Return the line about the number of client actors and their shares."""
    runtime = recipe.runtime
    actors, gpus = runtime.client_actors, runtime.gpus_per_actor
    most = max(planned.clients for planned in rounds)
    count = f"1 to {most} (auto)" if actors == "auto" else str(actors)
    share = "1 GPU" if gpus == "auto" else f"{gpus:g} GPU"
    gpu = "" if runtime.device == "cpu" or gpus == 0 else f" and {share} where the cluster has GPUs"
    where, trainers = f"client actors: {count}", runtime.trainers_per_actor
    if runtime.executor == "local":
        threads = 1 if actors == "auto" or runtime.device == "cuda" else actors * trainers
        where = "this process" if threads == 1 else f"this process, up to {threads} threads"
    several = runtime.executor == "ray" and runtime.device != "cuda" and trainers > 1
    at_once = f"; on CPUs each trains {trainers} blocks at once" if several else ""
    return f"{where}, each {runtime.cpus_per_actor:g} CPU{gpu}{at_once}"


def _own_settings(recipe: Recipe, settings: ClientSettings) -> Iterator[str]:
    """Yield the line about settings that differ between clients, if any."""
    ranges = [
        f"{key} {values.min():.4g} to {values.max():.4g}"
        for key, values in zip(recipe.own_settings, settings.own.values(), strict=True)
    ]
    if ranges:
        yield f"clients' own settings: {', '.join(ranges)}; trained together all the same"


def _blocks(
    recipe: Recipe, sizes: Outline, rounds: list[PlannedRound], batch: int
) -> Iterator[str]:
    """Yield how many clients are trained together, on each kind of device that may be used.

    `batch` is the largest batch size of a client.
    """
    found = _block_sizes(recipe, sizes, rounds, batch).values()
    for reason in dict.fromkeys(size.reason for size in found):
        yield f"trained together: {reason}"


def _block_sizes(
    recipe: Recipe, sizes: Outline, rounds: list[PlannedRound], batch: int
) -> dict[Device, BlockSize]:
    """Return the block of each kind of device that may be used; none without adapter rounds."""
    cohorts = [planned.clients for planned in rounds if planned.trainable == "adapter"]
    # Poisson sampling may draw no client.
    cohort = next((clients for clients in cohorts if clients > 0), None)
    if cohort is None:
        return {}
    runtime = recipe.runtime
    devices: list[Device] = ["cpu"] if runtime.device != "cuda" else []
    if runtime.executor == "ray" and runtime.device != "cpu" and runtime.gpus_per_actor != 0:
        devices.append("cuda")
    return {device: block_size(recipe, sizes.shape, cohort, device, batch) for device in devices}


def _memory(
    recipe: Recipe, sizes: Outline, rounds: list[PlannedRound], batch: int
) -> Iterator[ActorMemory]:
    """Yield the memory of an actor in the adapter rounds that train most."""
    adapters = [r.trainable_params for r in rounds if r.trainable == "adapter"]
    for device, size in _block_sizes(recipe, sizes, rounds, batch).items():
        most, short = max(adapters), sizes.short
        yield actor_memory(
            recipe, sizes.shape, most, size.clients, device, short=short, batch=batch
        )
