"""Tests of the global model: a section of the recipe. Source: this project."""

from __future__ import annotations

from typing import Literal

from rayfed_lora.recipe.fields import Fraction, Positive, Section, option


class Evaluation(Section):
    """When and how the global model is tested."""

    every: Positive = option(1, "test after every n-th round, and after the last one", "rounds")
    batch_size: Positive = option(256, "examples in a forward pass", "examples")
    client_fraction: Fraction = option(
        0.0, "share of each client's examples that is held out to test that client; 0: none"
    )
    clients: Positive | Literal["all"] = option(
        "all", "clients tested on their own held-out examples: all, or a number drawn for each test"
    )
    clients_every: Positive | None = option(
        None,
        "test clients after every n-th round, and after the last one; null: after the last only",
    )
