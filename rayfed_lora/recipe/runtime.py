"""Devices and actors: a section of the recipe. Source: this project."""

from __future__ import annotations

import math
from typing import Literal

from rayfed_lora.recipe.fields import Auto, NonNegative, Positive, PositiveFloat, Section, option


class Runtime(Section):
    """Where and how the work runs.

    On one kind of device these keys change no result, except for `cohort_size`,
    `threads_per_actor` and `precision`, which change the rounding of float32 (and `cohort_size`
    the dropout masks of texts of different lengths).
    """

    executor: Literal["ray", "local"] = option("ray", "ray, or local: in this process, without Ray")
    client_actors: Positive | Auto = option(
        "auto",
        "auto: as many as fit the cluster; executor local: threads on a CPU, auto: one",
        "actors",
    )
    gpus_per_actor: NonNegative | Auto = option(
        "auto", "auto: 1 where the cluster has GPUs, else 0; fractions share a GPU", "GPUs"
    )
    cpus_per_actor: PositiveFloat = option(
        1.0,
        "CPU cores reserved for an actor; on a CPU it trains one block at once for every"
        " `threads_per_actor` cores",
        "cores",
    )
    cohort_size: Positive | Auto = option(
        "auto", "clients trained together; auto: by the model's work and memory", "clients"
    )
    threads_per_actor: Positive = option(
        1, "torch threads for a block; with 1 results are bit-for-bit reproducible", "threads"
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32 | bf16: autocast")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto: a GPU where the cluster has one, else the CPU | cuda: an error without a GPU"
    )
    start_timeout_s: PositiveFloat = option(
        120.0, "longest wait for resources in use by others", "s"
    )
    scale_up_s: PositiveFloat | None = option(
        None,
        "longest wait for an autoscaling cluster to start nodes for `client_actors` actors; null:"
        " use only nodes that are already up",
        "s",
    )
    block_timeout_s: PositiveFloat | None = option(
        None,
        "an actor whose block, or share of a test, takes longer is ended and its work is rerun"
        " (executor ray); null: no limit",
        "s",
    )

    @property
    def trainers_per_actor(self) -> int:
        """Number of blocks that an actor on a CPU trains at once, each in its own thread.

        >>> Runtime(cpus_per_actor=2.0).trainers_per_actor
        2
        """
        return max(1, math.floor(self.cpus_per_actor / self.threads_per_actor))
