"""A plan in the terminal. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from rayfed_lora.annealing.stages import schedule
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.run_display import bill
from rayfed_lora.launching.memory_plan import CARDS
from rayfed_lora.plugins.tables import ALLOCATIONS
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.units import duration, megabytes

if TYPE_CHECKING:
    from rayfed_lora.launching.planning import Plan, PlannedRound

MOST_ROWS = 60  # of the schedule, without those of omitted rounds
_AT_AN_END = 3  # rounds or ranks shown at each end of a stage
_MOST_RANKS = 12  # of a stage, in one line


def show_stages(console: PlainConsole, recipe: Recipe) -> None:
    """Print each stage with its number of rounds and its ranks, which the recipe alone gives."""
    total = recipe.annealing.total_rounds
    console.print_line(f"{recipe.name}: {recipe.method}, {total:,} rounds")
    for stage, planned in groupby(schedule(recipe.annealing), lambda plan: plan.stage):
        rounds = list(planned)
        if rounds[0].trainable == "full":
            trained = "full model"
        else:
            ranks = [str(rank) for rank, _ in groupby(rounds, lambda plan: plan.rank)]
            if len(ranks) > _MOST_RANKS:
                ranks[_AT_AN_END:-_AT_AN_END] = ["..."]
            trained = f"rank {', '.join(ranks)}"
        plural = "s" if len(rounds) > 1 else ""
        console.print_line(f"  {stage}: {len(rounds):,} round{plural}, {trained}")


def show_plan(console: PlainConsole, recipe: Recipe, plan: Plan) -> None:
    """Print the schedule round by round, the bill, and what the run needs."""
    shape, examples = plan.outline.shape, plan.outline.devices.sizes
    console.print_line(
        f"{len(examples)} clients with {examples.min()} to {examples.max()} examples,"
        f" {len(plan.outline.label_names)} classes, {plan.outline.test_examples} test examples"
    )
    console.print_line(
        f"model of {shape.total_params:,} parameters, {len(shape.modules)} adapted modules,"
        f" head of {shape.head_params:,}"
    )
    rows = shown_rounds(plan.rounds)
    _print_schedule(console, plan.rounds, rows)
    left_out = sum(len(row) for row in rows if isinstance(row, range))
    if left_out > 0:
        console.print_line(
            f"{left_out:,} of {len(plan.rounds):,} rounds are not shown;"
            " rayfed_lora.plan(recipe).rounds has all of them"
        )
    acceptance = recipe.annealing.accepts.name
    if recipe.annealing.mode == "staged" and acceptance != "always":
        console.print_line(f"if every proposal is accepted (acceptance {acceptance})")
    if ALLOCATIONS[recipe.annealing.allocates.name].needs_spectra:
        name = recipe.annealing.allocates.name
        console.print_line(f"{name} allocation: ranks are the mean, bytes an upper bound")
    _print_selection(console, recipe, plan.outline.validation_examples)
    console.print(bill(plan.totals.communication()))
    for need in plan.needs:
        console.print_line(need)
    _print_memory(console, plan)
    for note in plan.notes:
        console.warn(note)


def _print_memory(console: PlainConsole, plan: Plan) -> None:
    """Print what an actor's memory holds while it trains adapters, by estimate."""
    if not plan.memory:
        return
    console.print_line("memory of an actor that trains adapters, by estimate:")
    rows = [
        {
            "on a": {"cpu": "CPU", "cuda": "GPU"}[each.device],
            "base": megabytes(each.base),
            "client's factors": megabytes(each.trained),
            "client's activations": megabytes(each.activations),
            "logits": megabytes(each.logits),
            "clients": str(each.clients),
            "in all": megabytes(each.total),
            **{f"fit in {name}": str(each.fitting(size)) for name, size in CARDS.items()},
        }
        for each in plan.memory
    ]
    console.print_rows(rows, optional=("logits", "client's factors", "client's activations"))


def _print_selection(console: PlainConsole, recipe: Recipe, validated: int) -> None:
    """Print the validation split, where there is one, and what is chosen by it."""
    settings, stopping = recipe.evaluation, recipe.evaluation.early_stopping
    if validated > 0:
        console.print_line(
            f"validation split of {validated} training examples, kept on the server"
            f" (data.validation_fraction {recipe.validation_fraction:g})"
        )
    if stopping is not None:
        console.print_line(
            f"early stopping: after {stopping.patience} tests (one in {settings.every} rounds) with"
            f" no better validation {stopping.metric}, so the rounds and bytes here are the most"
        )
    if settings.keep_best is not None:
        console.print_line(f"exported: the model of the best validation {settings.keep_best}")


def _print_schedule(
    console: PlainConsole, rounds: Sequence[PlannedRound], rows: Sequence[int | range]
) -> None:
    timed = rounds[0].simulated_s is not None
    shown = [_row(rounds[row], timed) for row in rows if isinstance(row, int)]
    for i, row in enumerate(rows):
        if isinstance(row, range):
            rest = dict.fromkeys(shown[0], "")
            shown.insert(i, rest | {"round": "...", "stage": f"{len(row):,} rounds"})
    console.print_rows(shown, optional=("values trained", "lr", "base a round"), left=["stage"])


def _row(r: PlannedRound, timed: bool) -> dict[str, str]:
    """Return a row of the schedule: sent values are of one round and of all its clients."""
    return {
        "round": str(r.round + 1),
        "stage": r.stage,
        "rank": "full" if r.rank is None else str(r.rank),
        "values trained": f"{r.trainable_params:,}",
        "lr": f"{r.learning_rate:.3g}",
        "clients": str(r.clients) if r.arriving == r.clients else f"{r.arriving} of {r.clients}",
        "up a round": megabytes(r.bytes_up),
        "down a round": megabytes(r.bytes_down),
        "base a round": megabytes(r.bytes_base),
        **({"simulated time": duration(r.simulated_s)} if timed else {}),
        **({} if r.epsilon is None else {"epsilon": f"{r.epsilon:.3g}"}),
    }


def shown_rounds(rounds: Sequence[PlannedRound]) -> list[int | range]:
    """Return the rounds to show: an index is a row, a range stands for omitted rounds.

    Up to `MOST_ROWS` rounds, all of them. Otherwise the first and last rounds of each stage, and as
    many of the rounds in which the rank changes as there is room for, evenly spaced.
    """
    count = len(rounds)
    if count <= MOST_ROWS:
        return list(range(count))
    kept: set[int] = set()
    for _, indices in groupby(range(count), lambda i: rounds[i].stage):
        stage = list(indices)
        kept.update(stage[:_AT_AN_END], stage[-_AT_AN_END:])
    changes = [i for i in range(1, count) if rounds[i].rank != rounds[i - 1].rank and i not in kept]
    room = MOST_ROWS - len(kept)
    if len(changes) > room:
        places = np.linspace(0, len(changes) - 1, room).astype(int)
        changes = [changes[i] for i in places.tolist()]
    rows: list[int | range] = []
    following = 0
    for i in sorted({*kept, *changes}):
        if i - following == 1:
            rows.append(following)  # as short as a row that says that one round is omitted
        elif i > following:
            rows.append(range(following, i))
        rows.append(i)
        following = i + 1
    return rows
