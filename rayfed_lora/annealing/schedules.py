"""Cooling curves: pure functions of the round inside the cooling stage.

Every curve but `constant` goes from `start` to `end` in `rounds` rounds, with u = (i + 1) / rounds
in round i (from 0): the first round is already past `start`, the last one exactly at `end`. Source
of the convention: this project; the paper's own formula is not public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from rayfed_lora.plugins.tables import SHAPES

Schedule = Callable[[int], float]


def shape(name: str | None = None) -> Callable[[Callable[..., float]], Any]:
    """Register a cooling curve: a function of (start, end, u), u in (0, 1].

    In round i of the stage u = (i + 1) / rounds; the last round is at `end` whatever the curve
    says. Keyword-only parameters are its options: keys beside `annealing.cooling.shape`.

    Args:
        name: value of `annealing.cooling.shape`; default: the function's, with hyphens.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """
    return lambda function: SHAPES.add(function, name)


@shape()
def linear(start: float, end: float, u: float) -> float:
    """Return start + (end - start) * u.

    >>> linear(16, 2, 0.5)
    9.0
    """
    return start + (end - start) * u


@shape()
def cosine(start: float, end: float, u: float) -> float:
    """Return end + (start - end) * (1 + cos(pi * u)) / 2.

    Source: this project, the half cosine of SGDR (arXiv:1608.03983) without restarts.

    >>> round(cosine(16, 2, 0.5), 12)
    9.0
    """
    return end + (start - end) * (1.0 + math.cos(math.pi * u)) / 2.0


@shape()
def cubic(start: float, end: float, u: float) -> float:
    """Return end + (start - end) * (1 - u) ** 3: steep at first.

    Source: AdaLoRA's budget curve, arXiv:2303.10512, applied per round.

    >>> cubic(16, 0, 0.5)
    2.0
    """
    return end + (start - end) * (1.0 - u) ** 3


@shape()
def exponential(start: float, end: float, u: float) -> float:
    """Return start * (end / start) ** u, 0 where `end` is 0.

    Source: geometric cooling, Kirkpatrick, Gelatt and Vecchi 1983, Science 220:671.

    >>> exponential(16, 4, 0.5)
    8.0
    """
    return 0.0 if start == 0 or end == 0 else start * (end / start) ** u


@shape()
def logarithmic(start: float, end: float, u: float) -> float:
    """Return start + (end - start) * log(1 + 9 u) / log 10.

    Source: the logarithmic cooling of Geman and Geman 1984, rescaled to meet both ends.

    >>> logarithmic(10, 0, 1.0)
    0.0
    """
    return start + (end - start) * math.log(1.0 + 9.0 * u) / math.log(10.0)


@shape()
def constant(start: float, end: float, u: float) -> float:
    """Return `start` throughout: fixed-rank LoRA, the baseline.

    >>> constant(16, 2, 1.0)
    16
    """
    del end, u
    return start


@shape()
def step(start: float, end: float, u: float, *, steps: int = 4) -> float:
    """Return one of `steps` equal plateaus, start + (end - start) * ceil(u * steps) / steps.

    >>> step(16, 0, 0.5, steps=4)
    8.0
    """
    # u * steps can land just above a whole number in floating point.
    return float(linear(start, end, math.ceil(round(u * steps, 9)) / steps))


@shape()
def cyclic(start: float, end: float, u: float, *, cycles: Annotated[int, Field(ge=1)] = 2) -> float:
    """Return the half cosine from `start` to `end`, `cycles` times: SGDR with equal cycles.

    Source: warm restarts, arXiv:1608.03983, applied to the rank.

    >>> [round(cyclic(16, 2, u), 12) for u in (0.25, 0.5, 0.75)]
    [9.0, 2.0, 9.0]
    """
    # The end of a cycle belongs to it; u * cycles can miss a whole number in floating point.
    done = round(u * cycles, 9)
    return float(cosine(start, end, done - math.ceil(done) + 1.0))


def cooling(
    name: str, start: float, end: float, rounds: int, options: Mapping[str, Any] | None = None
) -> Schedule:
    """Return the value of each cooling round.

    Args:
        name: of a shape.
        start: R0, the value before the first round.
        end: R1, the value of the last round (but for `constant`).
        rounds: length of the stage, > 0.
        options: values that options of the shape take.

    Raises:
        ValueError: an unknown shape, or a count that is not positive.

    >>> value = cooling("step", 16, 0, rounds=4, options={"steps": 2})
    >>> [value(i) for i in range(4)]
    [8.0, 8.0, 0.0, 0]
    """
    if rounds <= 0:
        raise ValueError(f"need rounds > 0, got {rounds}")
    if name not in SHAPES:
        raise ValueError(f"need a cooling shape of {', '.join(SHAPES)}, got {name!r}")
    curve = SHAPES.with_options(name, options or {})
    # The last round is at `end` exactly; the curves reach it only up to rounding.
    last = start if name == "constant" else end
    return lambda i: last if i + 1 == rounds else curve(start, end, (i + 1) / rounds)


def ramp(start: float, end: float, rounds: int) -> Schedule:
    """Return a linear rise from `start` in the first round to `end` in the last, or only, one.

    Raises:
        ValueError: `rounds` is not positive.

    >>> value = ramp(2, 16, rounds=3)
    >>> [value(i) for i in range(3)]
    [2.0, 9.0, 16.0]
    """
    if rounds <= 0:
        raise ValueError(f"need rounds > 0, got {rounds}")
    return lambda i: linear(start, end, i / (rounds - 1) if rounds > 1 else 1.0)


def to_rank(value: float, start: int, end: int) -> int:
    """Return floor(value + 0.5), clipped to the range between `start` and `end`.

    A value within 1e-9 of a half counts as a half: curves miss it by rounding.

    >>> to_rank(8.5, 16, 2), to_rank(1.4, 16, 2)
    (9, 2)
    """
    return min(max(math.floor(round(value, 9) + 0.5), min(start, end)), max(start, end))
