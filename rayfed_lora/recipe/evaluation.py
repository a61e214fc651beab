"""Tests of the global model: a section of the recipe. Source: this project."""

from __future__ import annotations

from typing import Literal

from rayfed_lora.recipe.fields import Fraction, Positive, Section, option


class Evaluation(Section):
    """When and how the global model is tested."""

    every: Positive = option(1, "test after every so many rounds, and after the last", "rounds")
    batch_size: Positive = option(256, "examples a forward pass", "examples")
    client_fraction: Fraction = option(
        0.0, "share of each client's examples that is kept to test on that client; 0: none"
    )
    clients: Positive | Literal["all"] = option(
        "all", "clients tested on examples of their own: all, or so many drawn anew each time"
    )
    clients_every: Positive | None = option(
        None, "test on clients after every so many rounds, and after the last; null: then only"
    )
