"""Devices and actors: a section of the recipe. Source: this project."""

from __future__ import annotations

import math
from typing import Literal

from rayfed_lora.recipe.fields import Auto, NonNegative, Positive, PositiveFloat, Section, option


class Runtime(Section):
    """Where the work runs.

    On the same kind of device nothing here changes a result, but for the rounding of float32 that
    comes with another `cohort_size`, `threads_per_actor` or `precision` (and with `cohort_size`
    for the dropout masks of texts of different lengths).
    """

    executor: Literal["ray", "local"] = option("ray", "ray, or local: in this process, without Ray")
    client_actors: Positive | Auto = option(
        "auto",
        "auto: as many as the cluster holds; executor local: threads on a CPU, auto: one",
        "actors",
    )
    gpus_per_actor: NonNegative | Auto = option(
        "auto", "auto: 1 where the cluster has GPUs, else 0; fractions share a GPU", "GPUs"
    )
    cpus_per_actor: PositiveFloat = option(
        1.0,
        "CPU cores reserved for an actor; on a CPU it trains a block in each `threads_per_actor` of"
        " them",
        "cores",
    )
    cohort_size: Positive | Auto = option(
        "auto", "clients trained together; auto: by the model's work and memory", "clients"
    )
    threads_per_actor: Positive = option(
        1, "torch threads for a block; 1 makes results bit-identical", "threads"
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32 | bf16: autocast")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto: a GPU where the cluster has one, else the CPU | cuda: refuse without a GPU"
    )
    start_timeout_s: PositiveFloat = option(
        120.0, "how long to wait for resources that others hold", "s"
    )
    scale_up_s: PositiveFloat | None = option(
        None,
        "how long an autoscaling cluster may take to bring nodes for `client_actors` actors; null:"
        " only nodes that are there count",
        "s",
    )
    block_timeout_s: PositiveFloat | None = option(
        None,
        "an actor whose block, or share of a test, takes longer is ended and the work run again"
        " (executor ray); null: no limit",
        "s",
    )

    @property
    def trainers_per_actor(self) -> int:
        """How many blocks an actor on a CPU trains at once, each in a thread of its own.

        >>> Runtime(cpus_per_actor=2.0).trainers_per_actor
        2
        """
        return max(1, math.floor(self.cpus_per_actor / self.threads_per_actor))
