"""The Pareto front of trials, the best one by an objective, and the knee of the front.

Source: this project; the knee as the point nearest to the ideal one is compromise programming,
Zeleny 1973.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayfed_lora.tuning.space import Mode

Values = npt.NDArray[np.float64]


def _losses(values: Values, modes: Sequence[Mode]) -> Values:
    """Return the values with signs such that less is better."""
    return np.where(np.array(modes) == "max", -values, values)


def on_front(values: Values, modes: Sequence[Mode]) -> npt.NDArray[np.bool_]:
    """Return which rows no other row dominates: as good in all objectives and better in one.

    Args:
        values: (trials, objectives), finite.
        modes: whether the largest or the smallest value of each objective is best.

    Returns:
        (trials,); equal rows are all on the front.
    """
    losses = _losses(values, modes)
    as_good = (losses[:, None] <= losses[None]).all(axis=2)
    better = (losses[:, None] < losses[None]).any(axis=2)
    return ~np.asarray((as_good & better).any(axis=0))


def best(values: Values, modes: Sequence[Mode], objective: int) -> int:
    """Return the row that is best in one objective; the others break ties, in order."""
    losses = _losses(values, modes)
    others = [i for i in range(len(modes)) if i != objective]
    # The last key of lexsort is the primary one.
    return int(np.lexsort([losses[:, i] for i in (*reversed(others), objective)])[0])


def knee(values: Values, modes: Sequence[Mode]) -> int:
    """Return the row of the front that is nearest to the ideal point.

    Each objective is scaled so that the best of the front is 0 and its worst 1; the distance is
    Euclidean. The first of equal rows is returned.
    """
    losses = _losses(values, modes)
    front = np.flatnonzero(on_front(values, modes))
    low, high = losses[front].min(axis=0), losses[front].max(axis=0)
    scaled = (losses[front] - low) / np.where(high > low, high - low, 1.0)
    return int(front[np.argmin((scaled**2).sum(axis=1))])
