"""Testing the global model: fixed shards of rows, summed in their order. Source: this project."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rayfed_lora.types import EvaluationSums


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on one split: share classified correctly, mean cross entropy (nats)."""

    accuracy: float
    loss: float


def shards(rows: int, size: int) -> list[slice]:
    """Cut a split into shards of at most `size` rows, as large as each other, to one.

    >>> shards(5, 2)
    [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    """
    count = math.ceil(rows / size)
    edges = [i * rows // count for i in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]


def scores(sums: Sequence[EvaluationSums]) -> Scores:
    """Add the sums of all shards, in order.

    >>> scores([EvaluationSums(3, 1.5, 2), EvaluationSums(1, 0.5, 1)])
    Scores(accuracy=0.75, loss=0.5)
    """
    examples = sum(part.examples for part in sums)
    correct = sum(part.correct for part in sums)
    return Scores(correct / examples, sum(part.loss for part in sums) / examples)
