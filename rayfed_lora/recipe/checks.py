"""What no single key of a recipe can tell: values that do not go together.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayfed_lora.locations import holds_secret, repeated_option
from rayfed_lora.recipe.rule_facts import RULE_FACTS

if TYPE_CHECKING:
    from rayfed_lora.recipe.annealing import Annealing
    from rayfed_lora.recipe.devices import Spread
    from rayfed_lora.recipe.recipe import Recipe, Runtime


# Each round is a row of a table, in memory and in files that are written again and again.
MOST_ROUNDS = 100_000


@dataclass(frozen=True)
class Conflict:
    """Values that do not go together.

    Attributes:
        paths: the keys involved, the one to change first.
        message: what is expected of it, and what came.
    """

    paths: tuple[str, ...]
    message: str


class ConflictError(ValueError):
    """Carries every conflict of a recipe through pydantic."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        """Word one message that lists all of them."""
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(f"{c.paths[0]}: {c.message}" for c in self.conflicts))


def conflicts(recipe: Recipe) -> list[Conflict]:
    """Return every conflict of a recipe whose values are each valid."""
    return [
        *_of_locations(recipe),
        *_of_data_and_model(recipe),
        *_of_stages(recipe.annealing),
        *_of_acceptance(recipe),
        *_of_clients(recipe),
        *_of_rule(recipe),
        *_of_devices(recipe),
        *_of_evaluation(recipe),
        *_of_gpus(recipe.runtime),
    ]


def _of_locations(recipe: Recipe) -> Iterator[Conflict]:
    """A recipe is kept with its run, and shown in reports: it may not hold credentials."""
    named = {
        "data.source": recipe.data.source,
        "model.source": recipe.model.source,
        "model.tokenizer": recipe.model.tokenizer,
        "clients.availability.trace": recipe.clients.availability.trace,
        "storage.path": recipe.storage.path,
    }
    for key, location in named.items():
        if location is not None and location.lower().startswith("fsspec+"):
            # Its filesystems are many, and each has its own way to find credentials.
            yield Conflict((key,), "expected a path, or a URI of s3, gs, abfs, hdfs or file")
        twice = None if location is None else repeated_option(location)
        if twice is not None:
            yield Conflict((key,), f"expected each option of a URI once, got {twice!r} again")
        if location is not None and holds_secret(location):
            yield Conflict(
                (key,),
                "expected a URI without credentials; they come from the environment, ~/.aws or the"
                " machine's role",
            )


def _of_data_and_model(recipe: Recipe) -> Iterator[Conflict]:
    partition, model = recipe.data.partition, recipe.model
    if partition.kind == "column" and partition.column is None:
        yield Conflict(
            ("data.partition.column", "data.partition.kind"),
            "partition kind 'column' needs the name of a data column, got null",
        )
    if model.source == "config" and not isinstance(model.config.get("architecture"), str):
        yield Conflict(
            ("model.config.architecture", "model.config", "model.source"),
            "model source 'config' needs a transformers model type such as vit or bert",
        )
    if model.task == "causal-lm" and recipe.adapter.train_head:
        yield Conflict(
            ("adapter.train_head", "model.task", "method"),
            "expected false with model.task 'causal-lm', whose output layer is its vocabulary and"
            " stays frozen, got true",
        )


def _of_stages(annealing: Annealing) -> Iterator[Conflict]:
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


def _of_acceptance(recipe: Recipe) -> Iterator[Conflict]:
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
            "'metropolis' does not go with residual 'fold': a folded shrink leaves the model as it"
            " is, so every proposal would be accepted; use 'always', or residual 'drop'",
        )
    adapter_initiating = annealing.initiating.trainable == "adapter" and annealing.initiating_rounds
    at_heating_rank = annealing.heating.rounds > 0 or adapter_initiating
    value_is_sought = annealing.feedback == "target" and annealing.target.value is None
    if value_is_sought and not at_heating_rank:
        yield Conflict(
            ("annealing.target.value", "annealing.heating.rounds"),
            "acceptance 'target' expects a number here, or heating.rounds above 0 to find it in",
        )


def _of_clients(recipe: Recipe) -> Iterator[Conflict]:
    clients, partition = recipe.clients, recipe.data.partition
    if clients.local_steps is not None and clients.local_epochs is not None:
        yield Conflict(
            ("clients.local_epochs", "clients.local_steps"),
            "give local_steps or local_epochs, not both",
        )
    known = partition.kind != "column" and isinstance(clients.per_round, int)
    if known and clients.per_round > partition.clients:
        yield Conflict(
            ("clients.per_round", "data.partition.clients"),
            f"expected at most data.partition.clients ({partition.clients}),"
            f" got {clients.per_round}",
        )


def _of_evaluation(recipe: Recipe) -> Iterator[Conflict]:
    settings = recipe.evaluation
    if settings.clients_every is not None and settings.client_fraction == 0:
        yield Conflict(
            ("evaluation.client_fraction", "evaluation.clients_every"),
            "evaluation.clients_every needs examples to test clients on: expected a share above 0,"
            " got 0",
        )


def _of_devices(recipe: Recipe) -> Iterator[Conflict]:
    clients, network = recipe.clients, recipe.network
    spreads = {
        "clients.speed": clients.speed,
        "network.up_mbps": network.up_mbps,
        "network.down_mbps": network.down_mbps,
    }
    for path, spread in spreads.items():
        if spread is not None:
            yield from _of_spread(path, spread)
    time_passes = network.latency_s > 0 or any(spread is not None for spread in spreads.values())
    if clients.deadline_s is not None and not time_passes:
        yield Conflict(
            ("clients.deadline_s", "clients.speed", "network"),
            "nobody can be late where nothing takes time; expected clients.speed or network too",
        )
    if clients.availability.period_s is not None and clients.availability.trace is None:
        yield Conflict(
            ("clients.availability.period_s", "clients.availability.trace"),
            "expected a trace that is to begin anew",
        )


def _of_spread(path: str, spread: Spread) -> Iterator[Conflict]:
    given = [key for key in ("median", "low", "high", "column") if getattr(spread, key) is not None]
    expected = {"lognormal": ["median"], "uniform": ["low", "high"]}[spread.distribution]
    if given not in (expected, ["column"]):
        yield Conflict(
            (path,),
            f"distribution '{spread.distribution}' expects {' and '.join(expected)}, or a column"
            f" instead, got {', '.join(given) or 'none of them'}",
        )
    elif spread.low is not None and spread.high is not None and spread.low > spread.high:
        yield Conflict(
            (f"{path}.low", f"{path}.high"),
            f"expected at most high ({spread.high:g}), got {spread.low:g}",
        )
    elif spread.sigma > 0 and spread.median is None:
        yield Conflict(
            (f"{path}.sigma", path),
            f"expected 0 without a lognormal distribution's median, got {spread.sigma:g}",
        )


def _of_rule(recipe: Recipe) -> Iterator[Conflict]:
    """What a rule cannot do. A run without adapter rounds asks nothing of it."""
    name, annealing, adapter = recipe.aggregation.rule, recipe.annealing, recipe.adapter
    rule, optimizer = RULE_FACTS[name], recipe.aggregation.server_optimizer.name
    key = "aggregation.rule"
    if annealing.heating.rank == 0 and not (adapter.train_head or adapter.train_biases):
        yield Conflict(
            ("annealing.heating.rank", "adapter.train_head"),
            "rank 0 leaves nothing to train; expected train_head, train_biases or a higher rank",
        )
    if annealing.mode == "full":
        return
    if optimizer != "sgd" and not rule.optimizers:
        fitting = ", ".join(n for n, entry in RULE_FACTS.items() if entry.optimizers)
        yield Conflict(
            ("aggregation.server_optimizer.name", key),
            f"'{optimizer}' steps along A and B, rule '{name}' does not average them; expected sgd,"
            f" or one of the rules {fitting}",
        )
    ranks = recipe.clients.ranks
    if not rule.mixed_ranks and _smallest(ranks, annealing.heating.rank) < annealing.heating.rank:
        fitting = ", ".join(n for n, entry in RULE_FACTS.items() if entry.mixed_ranks)
        yield Conflict(
            ("clients.ranks", key),
            f"rule '{name}' averages factors of the round's rank; for clients of other ranks"
            f" expected one of the rules {fitting}",
        )
    if rule.personal and annealing.mode == "staged" and _shrinks(annealing):
        yield Conflict(
            (key, "annealing.cooling.rank"),
            f"'{name}' goes with one rank only: a cut gives each client another A, and A is shared;"
            " expected annealing.mode fixed, cooling.rank equal to heating.rank, or another rule",
        )
    if rule.personal and annealing.allocation == "spectral":
        yield Conflict(
            (key, "annealing.allocation"),
            f"'{name}' goes with one rank only: 'spectral' would give each client another A, and A"
            " is shared; use uniform, or another rule",
        )
    if ranks is not None and annealing.cooling.residual == "fold":
        yield Conflict(
            ("clients.ranks", "annealing.cooling.residual"),
            "'fold' needs clients that hold all of what a cut folds; use residual drop, or no"
            " clients.ranks",
        )
    if rule.merges == "stack" and annealing.feedback == "metropolis":
        yield Conflict(
            (key, "annealing.acceptance"),
            f"'{name}' starts LoRA anew each round, a lower rank cuts nothing off that 'metropolis'"
            " could weigh; use acceptance always or target, or another rule",
        )
    if rule.merges == "stack" and annealing.allocation == "spectral":
        yield Conflict(
            (key, "annealing.allocation"),
            f"'{name}' starts LoRA anew each round: there is no trained adapter for 'spectral' to"
            " look at; use uniform, or another rule",
        )


def _smallest(ranks: int | list[int] | dict[int, float] | None, none: int) -> int:
    """Return the smallest limit of `clients.ranks`; `none` where there is no limit."""
    return min([ranks] if isinstance(ranks, int) else ranks or [none])


def _shrinks(annealing: Annealing) -> bool:
    """Return whether the schedule has more than one rank."""
    heating, cooling = annealing.heating, annealing.cooling
    moves = cooling.shape != "constant" and cooling.rounds + annealing.holding.rounds > 0
    ramps = heating.shape == "ramp" and heating.rounds > 1
    return (moves or ramps) and cooling.rank != heating.rank


def _of_gpus(runtime: Runtime) -> Iterator[Conflict]:
    share = runtime.gpus_per_actor
    if runtime.scale_up_s is not None and "auto" in (runtime.client_actors, runtime.device):
        yield Conflict(
            ("runtime.scale_up_s", "runtime.client_actors", "runtime.device"),
            "needs to know which nodes are wanted: expected a number of client_actors, and device"
            f" cuda or cpu, got {runtime.client_actors} and {runtime.device}",
        )
    if share == "auto":
        return
    if share > 1 and share != int(share):
        yield Conflict(
            ("runtime.gpus_per_actor",), f"above 1 expected a whole number, got {share:g}"
        )
    if abs(share * 1e4 - round(share * 1e4)) > 1e-6:
        yield Conflict(("runtime.gpus_per_actor",), f"expected steps of 0.0001, got {share:g}")
    if runtime.device == "cuda" and share == 0:
        yield Conflict(
            ("runtime.gpus_per_actor", "runtime.device"), "device 'cuda' needs a share above 0"
        )
