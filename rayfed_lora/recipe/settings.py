"""All settings of a run, each valid on its own; `checks` compares them with each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.clients import Clients, Network, Spread
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.fields import (
    Choosing,
    Count,
    Fraction,
    NameIn,
    Positive,
    PositiveFloat,
    Section,
    option,
    section,
)
from rayfed_lora.recipe.model import Adapter, Model
from rayfed_lora.recipe.presets import PRESETS, usual_server_rate
from rayfed_lora.recipe.runtime import Evaluation, Runtime, Storage, Tracking
from rayfed_lora.recipe.wire import Privacy, Wire

# 100 * 1.1 is a little more than 110 in floating point.
_ROUNDING = 1e-9


class ServerOptimizer(Section):
    """The step the server takes along the averaged update."""

    name: Literal["sgd", "momentum", "adam", "yogi"] = option(
        "sgd", "sgd with lr 1 is plain averaging | momentum (FedAvgM) | adam, yogi (FedOpt)"
    )
    lr: PositiveFloat = option(
        1.0, "server learning rate; default 1 for sgd and momentum, 0.01 for adam and yogi"
    )
    momentum: Fraction = option(0.9, "share of the earlier updates that is kept (momentum)")
    beta1: Fraction = option(0.9, "decay of the mean update (adam, yogi)")
    beta2: Fraction = option(0.99, "decay of the mean squared update (adam, yogi)")
    tau: PositiveFloat = option(1e-3, "added to the root of the mean square (adam, yogi)")

    @model_validator(mode="before")
    @classmethod
    def _default_rate(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("lr") is not None:
            return given
        return {**given, "lr": usual_server_rate(given.get("name"))}


class Aggregation(Choosing):
    """How client updates become the next global state."""

    choice = ("rule", RULES)

    rule: Annotated[str, NameIn(RULES)] = option(
        "factor-average", " | ".join(f"{name}: {rule.summary}" for name, rule in RULES.items())
    )
    server_optimizer: ServerOptimizer = section(ServerOptimizer, "the server's step")


# Of recipes that this version writes; it reads this and older ones.
RECIPE_VERSION = 1


def _known_version(value: int) -> int:
    if value > RECIPE_VERSION:
        raise PydanticCustomError(
            "newer",
            "expected at most {version}: a newer rayfed-lora wrote this recipe; install that one",
            {"version": RECIPE_VERSION},
        )
    return value


class Settings(Section):
    """The sections of a recipe, and quantities that depend on several of them."""

    version: Annotated[Positive, AfterValidator(_known_version)] = option(
        RECIPE_VERSION, "of the keys of recipes; a recipe without one is of version 1"
    )
    name: str = Field(
        "run", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run"
    )
    seed: Count = option(0, "seed of every random draw")
    plugins: list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")]] = option(
        [],
        "modules of own methods; each is imported only where the caller allows it (--plugins)",
    )
    method: Annotated[str, NameIn(PRESETS)] = option(
        "sa-fedlora", "preset that fills in keys; a key that is written wins"
    )
    data: Data = section(Data, "examples and clients")
    model: Model = Field(description="base model")
    adapter: Adapter = section(Adapter, "LoRA")
    annealing: Annealing = section(Annealing, "schedule of the parameter budget")
    aggregation: Aggregation = section(Aggregation, "server")
    clients: Clients = section(Clients, "cohort and local training")
    network: Network = section(Network, "simulated network")
    wire: Wire = section(Wire, "codecs of the messages")
    privacy: Privacy | None = option(None, "client-level differential privacy; null: none")
    evaluation: Evaluation = section(Evaluation, "tests of the global model")
    runtime: Runtime = section(Runtime, "executor")
    storage: Storage = section(Storage, "run folder")
    tracking: Tracking = section(Tracking, "TensorBoard, W&B, MLflow")

    @property
    def validation_fraction(self) -> float:
        """Share of the training examples that the server keeps for feedback and selection."""
        fraction = self.data.validation_fraction
        if fraction != "auto":
            return fraction
        needed = self.annealing.feedback != "nothing" or self.evaluation.watched
        return 0.1 if needed else 0.0

    def cohort_size(self, clients: int) -> int:
        """Return the number of clients in a round out of `clients`, at least 1."""
        share = self.clients.per_round
        return share if isinstance(share, int) else max(1, math.floor(share * clients + 0.5))

    def drawn(self, clients: int) -> int:
        """Return the number of clients drawn for a round out of `clients`, late ones included."""
        wanted = self.cohort_size(clients) * self.clients.over_select
        return min(clients, math.ceil(wanted - _ROUNDING))

    @property
    def spreads(self) -> dict[str, Spread]:
        """The given properties of devices that differ between clients, by key path."""
        named = {
            "clients.speed": self.clients.speed,
            "network.up_mbps": self.network.up_mbps,
            "network.down_mbps": self.network.down_mbps,
        }
        return {path: spread for path, spread in named.items() if spread is not None}

    @property
    def own_settings(self) -> dict[str, Spread]:
        """The settings of local training that differ between clients, by key path."""
        named = {
            "clients.optimizer.lr": self.clients.optimizer.lr,
            "clients.local_steps": self.clients.local_steps,
            "clients.batch_size": self.clients.batch_size,
        }
        return {path: value for path, value in named.items() if isinstance(value, Spread)}

    @property
    def simulates_time(self) -> bool:
        """Whether clients arrive, leave or take time by the simulated clock."""
        own = self.clients
        varies = own.availability.dropout > 0 or own.availability.trace is not None
        takes_time = self.network.latency_s > 0 or bool(self.spreads)
        return varies or takes_time or own.over_select > 1 or own.deadline_s is not None

    @property
    def device_columns(self) -> tuple[str, ...]:
        """Columns of the data that describe clients' devices, or are settings of their training."""
        named = (spread.column for spread in (self.spreads | self.own_settings).values())
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def most_failed(self, cohort: int) -> int:
        """Return how many clients of a cohort may raise an error before the run ends."""
        most = self.clients.max_failed
        return most if isinstance(most, int) else math.floor(most * cohort)
