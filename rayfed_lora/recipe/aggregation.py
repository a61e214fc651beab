"""The aggregation rule and the server's optimiser: sections of the recipe. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import model_validator

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.recipe.fields import Fraction, NameIn, PositiveFloat, Section, option, section
from rayfed_lora.recipe.presets import usual_server_rate


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


class Aggregation(Section):
    """How client updates become the next global state."""

    rule: Annotated[str, NameIn(RULES)] = option(
        "factor-average", " | ".join(f"{name}: {rule.summary}" for name, rule in RULES.items())
    )
    server_optimizer: ServerOptimizer = section(ServerOptimizer, "the server's step")
