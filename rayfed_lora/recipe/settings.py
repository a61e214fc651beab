"""All settings of a run, each valid on its own; `checks` compares them with each other.

Source: this project (the formulas behind the options: `annealing`, `lora`, `aggregation`).
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from rayfed_lora.recipe.aggregation import Aggregation
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.clients import Clients
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.devices import Network
from rayfed_lora.recipe.evaluation import Evaluation
from rayfed_lora.recipe.fields import Count, NameIn, Section, option, section
from rayfed_lora.recipe.model import Adapter, Model
from rayfed_lora.recipe.presets import PRESETS
from rayfed_lora.recipe.runtime import Runtime
from rayfed_lora.recipe.storage import Storage, Tracking

# 100 * 1.1 is a little more than 110 in floating point.
_ROUNDING = 1e-9


class Settings(Section):
    """The sections of a recipe, and quantities that depend on several of them."""

    name: str = Field(
        "run", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run"
    )
    seed: Count = option(0, "seed of every random draw")
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
    evaluation: Evaluation = section(Evaluation, "tests of the global model")
    runtime: Runtime = section(Runtime, "executor")
    storage: Storage = section(Storage, "run folder")
    tracking: Tracking = section(Tracking, "TensorBoard, W&B, MLflow")

    @property
    def validation_fraction(self) -> float:
        """Share of the training examples that the server keeps for feedback."""
        fraction = self.data.validation_fraction
        if fraction != "auto":
            return fraction
        return 0.0 if self.annealing.feedback == "always" else 0.1

    def cohort_size(self, clients: int) -> int:
        """Return the number of clients in a round out of `clients`, at least 1."""
        share = self.clients.per_round
        return share if isinstance(share, int) else max(1, math.floor(share * clients + 0.5))

    def drawn(self, clients: int) -> int:
        """Return the number of clients drawn for a round out of `clients`, late ones included."""
        wanted = self.cohort_size(clients) * self.clients.over_select
        return min(clients, math.ceil(wanted - _ROUNDING))

    @property
    def simulates_time(self) -> bool:
        """Whether clients arrive, leave or take time by the simulated clock."""
        own, network = self.clients, self.network
        spreads = (own.speed, network.up_mbps, network.down_mbps)
        varies = own.availability.dropout > 0 or own.availability.trace is not None
        takes_time = network.latency_s > 0 or any(spread is not None for spread in spreads)
        return varies or takes_time or own.over_select > 1 or own.deadline_s is not None

    @property
    def device_columns(self) -> tuple[str, ...]:
        """Columns of the data that describe clients' devices."""
        spreads = (self.clients.speed, self.network.up_mbps, self.network.down_mbps)
        named = [spread.column for spread in spreads if spread is not None]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def most_failed(self, cohort: int) -> int:
        """Return how many clients of a cohort may raise an error before the run ends."""
        most = self.clients.max_failed
        return most if isinstance(most, int) else math.floor(most * cohort)
