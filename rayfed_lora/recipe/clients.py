"""The cohort, local training, and simulated devices and network: sections of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, field_validator

from rayfed_lora.plugins.tables import OBJECTIVES, OPTIMIZERS, SAMPLERS, WEIGHTS
from rayfed_lora.recipe.fields import (
    MEMBERS,
    NUMBER_OR_MAPPING,
    Choosing,
    Count,
    Fraction,
    NameIn,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    also_plain,
    option,
    section,
    short_for,
)
from rayfed_lora.recipe.wire import Attack

Ranks = Annotated[list[Positive], Field(min_length=1)]
RankShares = Annotated[dict[Positive, PositiveFloat], Field(min_length=1)]


class Spread(Section):
    """A positive number that differs between clients. A plain number stands for `median`."""

    distribution: Literal["lognormal", "uniform"] = option(
        "lognormal", "lognormal: median * exp(sigma * normal) | uniform: between low and high"
    )
    median: PositiveFloat | None = option(None, "the middle of all clients (lognormal)")
    sigma: Annotated[float, Field(ge=0.0, le=10.0)] = option(
        0.0, "spread of the logarithm (lognormal); 0: the same for all"
    )
    low: PositiveFloat | None = option(None, "smallest value (uniform)")
    high: PositiveFloat | None = option(None, "largest value (uniform)")
    choices: Annotated[list[PositiveFloat], Field(min_length=1)] | None = option(
        None, "values to draw from instead"
    )
    shares: Annotated[list[PositiveFloat], Field(min_length=1)] | None = option(
        None, "share of clients with each of `choices`, in any unit; null: all the same"
    )
    column: str | None = option(
        None,
        "column of the data to use instead: the mean over a client's examples; for settings of"
        " local training, a value that all of a client's examples have",
    )


class Availability(Section):
    """When clients can be reached. A number stands for `dropout`, a text for `trace`."""

    dropout: Fraction = option(0.0, "probability that a client leaves during a round")
    trace: str | None = option(
        None,
        "file (.csv, .parquet, .jsonl, .arrow) of the times at which each client can be reached,"
        " with columns client (its value in `data.partition.column`, else its number from 0),"
        " start_s, end_s; a client without a row never can",
    )
    period_s: PositiveFloat | None = option(
        None, "period after which the trace repeats; null: never", "s"
    )


OwnNumber = Annotated[Spread | None, short_for({float: "median"})]
# A number for all clients, or numbers that differ between them.
Rate = Annotated[
    Annotated[PositiveFloat, Tag(MEMBERS[0])] | Annotated[Spread, Tag(MEMBERS[1])],
    NUMBER_OR_MAPPING,
]
Number = Annotated[
    Annotated[Positive, Tag(MEMBERS[0])] | Annotated[Spread, Tag(MEMBERS[1])], NUMBER_OR_MAPPING
]


def _or_text(schema: dict[str, Any]) -> None:
    """Let the schema of a section or null accept a text too."""
    schema["anyOf"].append({"type": "string"})


def own_number(description: str, unit: str) -> Any:
    """Return a field of a number that differs between clients; null by default."""

    def with_number(schema: dict[str, Any]) -> None:
        schema["anyOf"].append({"type": "number", "exclusiveMinimum": 0})
        schema["unit"] = unit

    return Field(None, description=description, json_schema_extra=with_number)


class Network(Section):
    """The simulated network between the server and its clients."""

    up_mbps: OwnNumber = own_number("bandwidth of uploads; null: they take no time", "Mbit/s")
    down_mbps: OwnNumber = own_number("bandwidth of downloads; null: they take no time", "Mbit/s")
    latency_s: NonNegative = option(0.0, "added to each message", "s")


class Optimizer(Choosing):
    """The clients' optimiser, created for each client and round."""

    choice = ("name", OPTIMIZERS)

    name: Annotated[str, NameIn(OPTIMIZERS)] = option(
        "sgd",
        "sgd | adamw | adam, adamax, nadam, radam, adagrad, adadelta, rmsprop, rprop, asgd: as of"
        " torch.optim",
    )
    lr: Rate = option(
        0.05, "learning rate; a mapping: one of each client's own, from a distribution or a column"
    )
    momentum: Fraction = option(0.0, "momentum (sgd, rmsprop)")
    weight_decay: NonNegative = option(0.0, "weight decay (decoupled for adamw)")


class Objective(Choosing):
    """What local training minimises. A text stands for `name`."""

    choice = ("name", OBJECTIVES)

    name: Annotated[str, NameIn(OBJECTIVES)] = option(
        "none", " | ".join(f"{name}: {found.summary}" for name, found in OBJECTIVES.items())
    )


class LrSchedule(Section):
    """The learning rate over rounds, as a factor on the stage's learning rate."""

    shape: Literal["constant", "linear", "cosine"] = option(
        "constant", "curve from 1 down to `final_factor` over the rounds after the warm-up"
    )
    final_factor: Annotated[float, Field(gt=0.0, le=1.0)] = option(0.1, "factor in the last round")
    warmup_rounds: Count = option(0, "rounds of linear rise to 1 at the start", "rounds")
    horizon: Positive | None = option(
        None,
        "the round in which the curve is at its end, and stays there; null: the last one. A run"
        " that is to be lengthened later needs it",
        "rounds",
    )


class Sampler(Choosing):
    """Which clients take part in a round. A text stands for `name`."""

    choice = ("name", SAMPLERS)
    name: Annotated[str, NameIn(SAMPLERS)] = option(
        "uniform",
        "uniform: drawn without replacement | power-of-choice: of some candidates those with the"
        " largest losses",
    )


class Weight(Choosing):
    """How much a client's update counts. A text stands for `name`."""

    choice = ("name", WEIGHTS)
    name: Annotated[str, NameIn(WEIGHTS)] = option(
        "examples", "examples: its number of examples | uniform: all the same"
    )


class Clients(Section):
    """The cohort of a round, and how a client trains."""

    per_round: Positive | Annotated[float, Field(gt=0.0, le=1.0)] = option(
        10, "cohort size: a number of clients, or a share of all such as 0.2", "clients"
    )
    sampler: Annotated[Sampler, short_for({str: "name"})] = Field(
        default_factory=Sampler,
        description="which clients take part in a round; a text: the sampler's name",
        json_schema_extra=lambda schema: also_plain(schema, "string"),
    )
    weight: Annotated[Weight, short_for({str: "name"})] = Field(
        default_factory=Weight,
        description="how much a client's update counts; a text: the weight's name",
        json_schema_extra=lambda schema: also_plain(schema, "string"),
    )
    local_steps: Number | None = option(
        None,
        "optimiser steps a round (default 5 where local_epochs is not given); a mapping: each"
        " client's own",
        "steps",
    )
    local_epochs: Positive | None = option(None, "passes over the client's own examples", "epochs")
    batch_size: Number = option(
        16,
        "examples of a micro-batch; a client with fewer uses all; a mapping: each client's own",
        "examples",
    )
    accumulate: Positive = option(
        1,
        "micro-batches a step: its gradient is that of one batch of batch_size * accumulate"
        " examples, weighted by examples, or by tokens in language models",
        "micro-batches",
    )
    optimizer: Optimizer = section(Optimizer, "local optimiser")
    objective: Annotated[Objective, short_for({str: "name"})] = Field(
        default_factory=Objective,
        description="what local training minimises, and what clients remember for it",
        json_schema_extra=lambda schema: also_plain(schema, "string"),
    )
    lr_schedule: LrSchedule = section(LrSchedule, "learning rate over rounds")
    max_grad_norm: PositiveFloat | None = option(None, "clip the gradient's 2-norm; null: never")
    max_failed: Count | Annotated[float, Field(gt=0.0, lt=1.0)] = option(
        0,
        "how many clients of a round may raise an error, and be left out, before the run ends: a"
        " number, or a share of the cohort",
        "clients",
    )
    over_select: Annotated[float, Field(ge=1.0, le=1000.0)] = option(
        1.0,
        "draw this many times `per_round` clients, and use the first `per_round` updates that"
        " arrive by the simulated clock",
    )
    deadline_s: PositiveFloat | None = option(
        None, "longest wait of a round, by the simulated clock; null: for all clients", "s"
    )
    availability: Annotated[Availability, short_for({float: "dropout", str: "trace"})] = Field(
        default_factory=Availability,
        description="when clients can be reached; a number: probability of leaving during a round;"
        " a text: file of a trace",
        json_schema_extra=lambda schema: also_plain(schema, "number", "string"),
    )
    speed: OwnNumber = own_number(
        "examples that a client trains the adapter on in a second (a full model takes 1.5 times as"
        " long); null: training takes no time",
        "examples/s",
    )
    ranks: Positive | Ranks | RankShares | None = option(
        None,
        "largest rank that a client can train: a number for all | a list, dealt to clients in turn"
        " | ranks with their shares, drawn from the seed, e.g. {4: 0.5, 16: 0.5}; null: no limit",
        "rank",
    )

    attack: Annotated[Attack | None, short_for({str: "name"})] = Field(
        None,
        description="malicious clients; a text: name of the attack; null: none",
        json_schema_extra=_or_text,
    )

    @field_validator("ranks", mode="before")
    @classmethod
    def _numbers_as_keys(cls, value: Any) -> Any:
        """Accept keys that JSON and some YAML writers quote."""
        if not isinstance(value, Mapping):
            return value
        return {
            int(key) if isinstance(key, str) and key.isdecimal() else key: share
            for key, share in value.items()
        }

    @property
    def steps(self) -> int | Spread | None:
        """Local steps a round, or None where the length is given in epochs."""
        return (self.local_steps or 5) if self.local_epochs is None else None

    @property
    def lowest_rank(self) -> int | None:
        """The smallest limit of `ranks`, or None without limits."""
        if self.ranks is None or isinstance(self.ranks, int):
            return self.ranks
        return min(self.ranks)
