"""Cooling curves: pure functions of the round inside the cooling stage.

Every curve but `constant` goes from `start` to `end` in `rounds` rounds, with u = (i + 1) / rounds
in round i (from 0): the first round is already past `start`, the last one exactly at `end`. Source
of the convention: this project; the paper's own formula is not public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

Schedule = Callable[[int], float]
Curve = Callable[[float, float, float], float]


def linear(start: float, end: float, u: float) -> float:
    """Return start + (end - start) * u.

    >>> linear(16, 2, 0.5)
    9.0
    """
    return start + (end - start) * u


def cosine(start: float, end: float, u: float) -> float:
    """Return end + (start - end) * (1 + cos(pi * u)) / 2.

    Source: this project, the half cosine of SGDR (arXiv:1608.03983) without restarts.

    >>> round(cosine(16, 2, 0.5), 12)
    9.0
    """
    return end + (start - end) * (1.0 + math.cos(math.pi * u)) / 2.0


def cubic(start: float, end: float, u: float) -> float:
    """Return end + (start - end) * (1 - u) ** 3: steep at first.

    Source: AdaLoRA's budget curve, arXiv:2303.10512, applied per round.

    >>> cubic(16, 0, 0.5)
    2.0
    """
    return end + (start - end) * (1.0 - u) ** 3


def exponential(start: float, end: float, u: float) -> float:
    """Return start * (end / start) ** u, 0 where `end` is 0.

    Source: geometric cooling, Kirkpatrick, Gelatt and Vecchi 1983, Science 220:671.

    >>> exponential(16, 4, 0.5)
    8.0
    """
    return 0.0 if start == 0 or end == 0 else start * (end / start) ** u


def logarithmic(start: float, end: float, u: float) -> float:
    """Return start + (end - start) * log(1 + 9 u) / log 10.

    Source: the logarithmic cooling of Geman and Geman 1984, rescaled to meet both ends.

    >>> logarithmic(10, 0, 1.0)
    0.0
    """
    return start + (end - start) * math.log(1.0 + 9.0 * u) / math.log(10.0)


def constant(start: float, end: float, u: float) -> float:
    """Return `start` throughout: fixed-rank LoRA, the baseline.

    >>> constant(16, 2, 1.0)
    16
    """
    del end, u
    return start


CURVES: Mapping[str, Curve] = {
    curve.__name__: curve for curve in (linear, cosine, cubic, exponential, logarithmic, constant)
}


def cooling(shape: str, start: float, end: float, rounds: int, steps: int = 4) -> Schedule:
    """Return the value of each cooling round.

    Args:
        shape: a key of `CURVES`, or `step`: `steps` equal plateaus, start + (end - start) *
            ceil(u * steps) / steps.
        start: R0, the value before the first round.
        end: R1, the value of the last round (but for `constant`).
        rounds: length of the stage, > 0.
        steps: number of plateaus of `step`, > 0.

    Raises:
        ValueError: an unknown shape, or a count that is not positive.

    >>> value = cooling("step", 16, 0, rounds=4, steps=2)
    >>> [value(i) for i in range(4)]
    [8.0, 8.0, 0.0, 0.0]
    """
    if rounds <= 0 or steps <= 0:
        raise ValueError(f"need rounds > 0 and steps > 0, got {rounds} and {steps}")
    if shape == "step":
        # ceil((i + 1) * steps / rounds) in integers: u * steps in floats can land just above.
        return lambda i: linear(start, end, -(-(i + 1) * steps // rounds) / steps)
    if shape not in CURVES:
        known = ", ".join([*CURVES, "step"])
        raise ValueError(f"need a cooling shape of {known}, got {shape!r}")
    curve = CURVES[shape]
    # The last round is at `end` exactly; the curves reach it only up to rounding.
    last = start if shape == "constant" else end
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
