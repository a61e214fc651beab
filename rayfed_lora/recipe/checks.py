"""Checks of a recipe's values against each other, once each is valid on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.locations import each, holds_secret, repeated_option
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.plugins.registry import KEYS, TABLES
from rayfed_lora.plugins.tables import ALLOCATIONS
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.chosen import chosen_methods
from rayfed_lora.recipe.data_checks import data_conflicts
from rayfed_lora.recipe.feedback_checks import feedback_conflicts
from rayfed_lora.recipe.runtime import Runtime
from rayfed_lora.recipe.settings import Settings
from rayfed_lora.recipe.spread_checks import spread_conflicts
from rayfed_lora.recipe.wire_checks import wire_conflicts

# Each round is a row of a table, in memory and in files that are rewritten many times.
MOST_ROUNDS = 100_000


class Conflict(NamedTuple):
    """Values that do not go together: their keys, the one to change first, and what is wrong."""

    paths: tuple[str, ...]
    message: str


class ConflictError(ValueError):
    """Carries every conflict of a recipe through pydantic."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(f"{c.paths[0]}: {c.message}" for c in self.conflicts))


def conflicts(recipe: Settings) -> list[Conflict]:
    """Return every conflict of a recipe whose values are each valid."""
    return [
        *_location_conflicts(recipe),
        *_ambiguous_methods(recipe),
        *_stage_conflicts(recipe.annealing),
        *_client_conflicts(recipe),
        *_rule_conflicts(recipe),
        *_objective_conflicts(recipe),
        *_device_conflicts(recipe),
        *_actor_conflicts(recipe.runtime),
        *(Conflict(*found) for found in _apart(recipe)),
    ]


def _apart(recipe: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the conflicts that have files of their own."""
    yield from data_conflicts(recipe)
    yield from feedback_conflicts(recipe)
    yield from wire_conflicts(recipe)


def _ambiguous_methods(recipe: Settings) -> Iterator[Conflict]:
    """Yield names that are of a built-in method and of one of the recipe's plug-ins."""
    for method in chosen_methods(recipe):
        if not method.built_in or method.kind not in KEYS:
            continue
        for other in TABLES[method.kind].methods():
            if other.short == method.name and other.module in recipe.plugins:
                yield Conflict(
                    (KEYS[method.kind],),
                    f"{method.name!r} is a built-in {method.kind}, and one of a plug-in; expected"
                    f" {other.name!r} for the latter, or no such plug-in",
                )


def _location_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """A recipe is kept with its run, and shown in reports: it may not hold credentials."""
    named = {
        "data.source": recipe.data.source,
        "data.test_source": recipe.data.test_source,
        # A template's own text has braces.
        "data.template": None if "{" in recipe.data.template else recipe.data.template,
        "model.source": recipe.model.source,
        "model.tokenizer": recipe.model.tokenizer,
        "model.adapter": recipe.model.adapter,
        "clients.availability.trace": recipe.clients.availability.trace,
        "storage.path": recipe.storage.path,
    }
    for key, location in ((key, one) for key, found in named.items() for one in each(found)):
        if location.lower().startswith("fsspec+"):
            # fsspec has many filesystems, each with its own way to find credentials.
            yield Conflict((key,), "expected a path, or a URI of s3, gs, abfs, hdfs or file")
        twice = repeated_option(location)
        if twice is not None:
            yield Conflict((key,), f"expected each option of a URI once, got {twice!r} again")
        if holds_secret(location):
            yield Conflict(
                (key,),
                "expected a URI without credentials; they come from the environment, ~/.aws or the"
                " machine's role",
            )


def _stage_conflicts(annealing: Annealing) -> Iterator[Conflict]:
    heating, cooling, total = annealing.heating, annealing.cooling, annealing.total_rounds
    if total == 0:
        yield Conflict(
            tuple(f"annealing.{s}.rounds" for s in ("heating", "initiating", "cooling", "holding")),
            "need at least one round, the stages' rounds sum to 0",
        )
    if total > MOST_ROUNDS:
        stages = ("initiating", "heating", "cooling", "holding")
        longest = sorted(stages, key=lambda stage: -getattr(annealing, stage).rounds)
        yield Conflict(
            tuple(f"annealing.{stage}.rounds" for stage in longest),
            f"expected at most {MOST_ROUNDS:,} rounds in all stages together, got {total:,}",
        )
    changes = heating.ramps or annealing.cools
    if annealing.mode == "staged" and changes and cooling.rank > heating.rank:
        yield Conflict(
            ("annealing.cooling.rank", "annealing.heating.rank"),
            f"expected at most heating.rank ({heating.rank}), got {cooling.rank}",
        )


def _client_conflicts(recipe: Settings) -> Iterator[Conflict]:
    clients, partition = recipe.clients, recipe.data.partition
    if clients.local_steps is not None and clients.local_epochs is not None:
        yield Conflict(
            ("clients.local_epochs", "clients.local_steps"),
            "expected local_steps or local_epochs, got both",
        )
    horizon, warmup = clients.lr_schedule.horizon, clients.lr_schedule.warmup_rounds
    if horizon is not None and horizon <= warmup:
        yield Conflict(
            ("clients.lr_schedule.horizon", "clients.lr_schedule.warmup_rounds"),
            f"expected more than warmup_rounds ({warmup}), got {horizon}",
        )
    known = partition.kind != "column" and isinstance(clients.per_round, int)
    if known and clients.per_round > partition.clients:
        yield Conflict(
            ("clients.per_round", "data.partition.clients"),
            f"expected at most data.partition.clients ({partition.clients}),"
            f" got {clients.per_round}",
        )


def _rule_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Yield settings that an aggregation rule does not support in its adapter rounds."""
    name, annealing, adapter = recipe.aggregation.rule, recipe.annealing, recipe.adapter
    rule, optimizer = RULES[name], recipe.aggregation.server_optimizer.name
    key = "aggregation.rule"
    if annealing.heating.rank == 0 and not (adapter.train_head or adapter.train_biases):
        yield Conflict(
            ("annealing.heating.rank", "adapter.train_head"),
            "rank 0 leaves nothing to train; expected train_head, train_biases or a higher rank",
        )
    if rule.alone and annealing.mode != "fixed":
        yield Conflict(
            ("annealing.mode", key),
            f"'{name}' sends nothing, neither ranks nor full models: expected fixed, got"
            f" {annealing.mode}",
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
    if recipe.model.adapter is not None and rule.personal:
        yield Conflict(
            ("model.adapter", key),
            f"expected null with rule '{name}', whose clients start from a B of their own, 0, got"
            f" {recipe.model.adapter!r}",
        )
    lowest = recipe.clients.lowest_rank
    if not rule.mixed_ranks and lowest is not None and lowest < annealing.heating.rank:
        fitting = ", ".join(n for n, entry in RULES.items() if entry.mixed_ranks)
        yield Conflict(
            ("clients.ranks", key),
            f"rule '{name}' averages factors of the round's rank; for clients of other ranks"
            f" expected one of the rules {fitting}",
        )
    if rule.personal and annealing.mode == "staged" and _has_several_ranks(annealing):
        yield Conflict(
            (key, "annealing.cooling.rank"),
            f"'{name}' needs one rank: a cut gives each client another A, and A is shared;"
            " expected annealing.mode fixed, cooling.rank equal to heating.rank, or another rule",
        )
    if lowest is not None and annealing.cooling.residual == "fold":
        yield Conflict(
            ("clients.ranks", "annealing.cooling.residual"),
            "'fold' needs clients that hold every direction that a cut folds; use residual drop, or"
            " no clients.ranks",
        )
    if rule.restarts and annealing.feedback == "energies":
        yield Conflict(
            (key, "annealing.acceptance"),
            f"'{name}' starts LoRA anew each round: a lower rank cuts nothing that"
            f" '{annealing.accepts.name}' could evaluate; use acceptance always or target, or"
            " another rule",
        )
    shares = annealing.allocates.name
    trained = rule.restarts and ALLOCATIONS[shares].needs_spectra
    if (shares != "uniform" and rule.personal) or trained:
        reason = (
            f"needs one rank: '{shares}' would give each client another A, and A is shared"
            if rule.personal
            else f"starts LoRA anew each round: '{shares}' needs a trained adapter"
        )
        paths = (key, "annealing.allocation")
        yield Conflict(paths, f"'{name}' {reason}; use uniform, or another rule")


def _objective_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Yield settings that the clients' objective does not go with."""
    name, key, clients = recipe.clients.objective.name, "clients.objective.name", recipe.clients
    objective = OBJECTIVES[name]
    if objective.has("loss") and recipe.model.task == "causal-lm":
        yield Conflict(
            (key, "model.task"),
            f"{name!r} replaces the loss of a classifier; with model.task 'causal-lm' expected an"
            " objective without a loss of its own",
        )
    if objective.plain_sgd:
        optimizer = clients.optimizer
        reads = f"{name!r} takes (start - end) / (steps * lr) for the mean gradient"
        if optimizer.name != "sgd":
            message = f"{reads}: expected sgd, got {optimizer.name}"
            yield Conflict(("clients.optimizer.name", key), message)
        elif optimizer.momentum > 0:
            message = f"{reads}: expected 0, got {optimizer.momentum:g}"
            yield Conflict(("clients.optimizer.momentum", key), message)
        if clients.max_grad_norm is not None:
            message = f"{reads}: expected null (no clipping), got {clients.max_grad_norm:g}"
            yield Conflict(("clients.max_grad_norm", key), message)
    server = recipe.aggregation.server_optimizer
    if objective.steps_model and (server.name, server.lr) != ("sgd", 1.0):
        yield Conflict(
            ("aggregation.server_optimizer", key),
            f"{name!r} steps from the mean of the clients' models by itself: expected sgd with lr"
            f" 1, got {server.name} with lr {server.lr:g}",
        )
    if objective.one_rank and recipe.annealing.mode != "full":
        yield from _one_rank_conflicts(recipe, name, key)


def _one_rank_conflicts(recipe: Settings, name: str, key: str) -> Iterator[Conflict]:
    """Yield what would change the shapes, or the meaning, of factors between adapter rounds."""
    annealing, rule = recipe.annealing, RULES[recipe.aggregation.rule]
    keeps = f"{name!r} keeps a tensor for each trained one"
    if annealing.mode == "staged" and _has_several_ranks(annealing):
        yield Conflict(
            ("annealing.cooling.rank", key),
            f"{keeps}, and needs one rank: expected annealing.mode fixed or full, or cooling.rank"
            f" equal to heating.rank ({annealing.heating.rank}), got {annealing.cooling.rank}",
        )
    shares = annealing.allocates.name
    if shares != "uniform":
        message = f"{keeps}, and needs one rank: expected uniform, got {shares!r}"
        yield Conflict(("annealing.allocation", key), message)
    lowest = recipe.clients.lowest_rank
    if lowest is not None and lowest < annealing.heating.rank:
        message = f"{keeps}, and needs one rank: expected no limit below {annealing.heating.rank}"
        yield Conflict(("clients.ranks", key), f"{message}, got {lowest}")
    if rule.alone:
        reason = "trains each client alone"
    elif rule.frozen(0) != rule.frozen(1):
        reason = "trains A and B in turns"
    elif rule.personal:
        reason = "leaves each client a B of its own, in other coordinates than the others'"
    elif rule.restarts:
        reason = "starts LoRA anew each round"
    elif not rule.optimizers:
        reason = "gives A and B other coordinates each round"
    else:
        return
    fitting = [
        each
        for each, found in RULES.items()
        if found.optimizers and not found.personal and found.frozen(0) == found.frozen(1)
    ]
    yield Conflict(
        ("aggregation.rule", key),
        f"{keeps}, and rule {rule.name!r} {reason}: expected one of {', '.join(fitting)}",
    )


def _has_several_ranks(annealing: Annealing) -> bool:
    ramps = annealing.heating.ramps and annealing.heating.rounds > 1
    return (annealing.cools or ramps) and annealing.cooling.rank != annealing.heating.rank


def _device_conflicts(recipe: Settings) -> Iterator[Conflict]:
    clients, evaluation, spreads = recipe.clients, recipe.evaluation, recipe.spreads
    yield from (Conflict(*found) for found in spread_conflicts(recipe))
    if clients.deadline_s is not None and recipe.network.latency_s == 0 and not spreads:
        yield Conflict(
            ("clients.deadline_s", "clients.speed", "network"),
            "no client can be late without simulated time: expected clients.speed or network too",
        )
    if clients.availability.period_s is not None and clients.availability.trace is None:
        yield Conflict(
            ("clients.availability.period_s", "clients.availability.trace"),
            "expected a trace to repeat, got none",
        )
    if evaluation.clients_every is not None and evaluation.client_fraction == 0:
        yield Conflict(
            ("evaluation.client_fraction", "evaluation.clients_every"),
            "evaluation.clients_every needs examples to test clients on: expected a share above 0,"
            " got 0",
        )


def _actor_conflicts(runtime: Runtime) -> Iterator[Conflict]:
    share, key = runtime.gpus_per_actor, "runtime.gpus_per_actor"
    if runtime.scale_up_s is not None and "auto" in (runtime.client_actors, runtime.device):
        yield Conflict(
            ("runtime.scale_up_s", "runtime.client_actors", "runtime.device"),
            "needs to know which nodes to wait for: expected a number of client_actors, and device"
            f" cuda or cpu, got {runtime.client_actors} and {runtime.device}",
        )
    if share == "auto":
        return
    if share > 1:
        yield Conflict(
            (key,), f"expected at most 1, since an actor trains on one GPU, got {share:g}"
        )
    if abs(share * 1e4 - round(share * 1e4)) > 1e-6:
        yield Conflict((key,), f"expected steps of 0.0001, got {share:g}")
    if runtime.device == "cuda" and share == 0:
        yield Conflict((key, "runtime.device"), "device 'cuda' needs a share above 0")
