"""Checks of the schedule, the acceptance rule and the aggregation rule. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.conflict import Conflict
from rayfed_lora.recipe.settings import Settings

# Each round is a row of a table, in memory and in files that are rewritten many times.
MOST_ROUNDS = 100_000


def stage_conflicts(annealing: Annealing) -> Iterator[Conflict]:
    """Yield conflicts between the lengths, ranks and shapes of the stages."""
    heating, cooling, holding = annealing.heating, annealing.cooling, annealing.holding
    if annealing.total_rounds == 0:
        yield Conflict(
            tuple(f"annealing.{s}.rounds" for s in ("heating", "initiating", "cooling", "holding")),
            "need at least one round, the stages' rounds sum to 0",
        )
    if annealing.total_rounds > MOST_ROUNDS:
        stages = {s: getattr(annealing, s).rounds for s in ("initiating", "heating", "cooling")}
        stages["holding"] = holding.rounds
        longest = sorted(stages, key=lambda stage: -stages[stage])
        yield Conflict(
            tuple(f"annealing.{stage}.rounds" for stage in longest),
            f"expected at most {MOST_ROUNDS:,} rounds in all stages together,"
            f" got {annealing.total_rounds:,}",
        )
    ramps = heating.shape == "ramp" and heating.rounds > 0
    shrinks = cooling.shape != "constant" and cooling.rounds + holding.rounds > 0
    if annealing.mode == "staged" and (ramps or shrinks) and cooling.rank > heating.rank:
        yield Conflict(
            ("annealing.cooling.rank", "annealing.heating.rank"),
            f"expected at most heating.rank ({heating.rank}), got {cooling.rank}",
        )


def acceptance_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Yield conflicts of an acceptance rule with its feedback."""
    annealing = recipe.annealing
    if annealing.feedback == "always":
        return
    if recipe.data.validation_fraction == 0:
        yield Conflict(
            ("data.validation_fraction", "annealing.acceptance"),
            f"annealing.acceptance '{annealing.acceptance}' needs a value above 0 (or auto), got 0",
        )
    if annealing.feedback == "metropolis" and annealing.cooling.residual == "fold":
        yield Conflict(
            ("annealing.acceptance", "annealing.cooling.residual"),
            "'metropolis' does not go with residual 'fold': a folded cut does not change the model,"
            " so every proposal would be accepted; use 'always', or residual 'drop'",
        )
    adapter_initiating = annealing.initiating.trainable == "adapter" and annealing.initiating_rounds
    at_heating_rank = annealing.heating.rounds > 0 or adapter_initiating
    value_is_sought = annealing.feedback == "target" and annealing.target.value is None
    if value_is_sought and not at_heating_rank:
        yield Conflict(
            ("annealing.target.value", "annealing.heating.rounds"),
            "acceptance 'target' expects a number here, or heating.rounds above 0 to find it in",
        )


def rule_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Yield settings that an aggregation rule does not support in its adapter rounds."""
    name, annealing, adapter = recipe.aggregation.rule, recipe.annealing, recipe.adapter
    rule, optimizer = RULES[name], recipe.aggregation.server_optimizer.name
    key = "aggregation.rule"
    if annealing.heating.rank == 0 and not (adapter.train_head or adapter.train_biases):
        yield Conflict(
            ("annealing.heating.rank", "adapter.train_head"),
            "rank 0 leaves nothing to train; expected train_head, train_biases or a higher rank",
        )
    if annealing.mode == "full":
        return
    if optimizer != "sgd" and not rule.optimizers:
        fitting = ", ".join(n for n, entry in RULES.items() if entry.optimizers)
        yield Conflict(
            ("aggregation.server_optimizer.name", key),
            f"'{optimizer}' steps along A and B, rule '{name}' does not average them; expected sgd,"
            f" or one of the rules {fitting}",
        )
    lowest = recipe.clients.lowest_rank
    if not rule.mixed_ranks and lowest is not None and lowest < annealing.heating.rank:
        fitting = ", ".join(n for n, entry in RULES.items() if entry.mixed_ranks)
        yield Conflict(
            ("clients.ranks", key),
            f"rule '{name}' averages factors of the round's rank; for clients of other ranks"
            f" expected one of the rules {fitting}",
        )
    if rule.personal and annealing.mode == "staged" and _shrinks(annealing):
        yield Conflict(
            (key, "annealing.cooling.rank"),
            f"'{name}' needs one rank: a cut gives each client another A, and A is shared;"
            " expected annealing.mode fixed, cooling.rank equal to heating.rank, or another rule",
        )
    if rule.personal and annealing.allocation == "spectral":
        yield Conflict(
            (key, "annealing.allocation"),
            f"'{name}' needs one rank: 'spectral' would give each client another A, and A is"
            " shared; use uniform, or another rule",
        )
    if lowest is not None and annealing.cooling.residual == "fold":
        yield Conflict(
            ("clients.ranks", "annealing.cooling.residual"),
            "'fold' needs clients that hold every direction that a cut folds; use residual drop, or"
            " no clients.ranks",
        )
    if rule.restarts and annealing.feedback == "metropolis":
        yield Conflict(
            (key, "annealing.acceptance"),
            f"'{name}' starts LoRA anew each round: a lower rank cuts nothing that 'metropolis'"
            " could evaluate; use acceptance always or target, or another rule",
        )
    if rule.restarts and annealing.allocation == "spectral":
        yield Conflict(
            (key, "annealing.allocation"),
            f"'{name}' starts LoRA anew each round: 'spectral' needs a trained adapter; use"
            " uniform, or another rule",
        )


def _shrinks(annealing: Annealing) -> bool:
    """Return whether the schedule has more than one rank."""
    heating, cooling = annealing.heating, annealing.cooling
    moves = cooling.shape != "constant" and cooling.rounds + annealing.holding.rounds > 0
    ramps = heating.shape == "ramp" and heating.rounds > 1
    return (moves or ramps) and cooling.rank != heating.rank
