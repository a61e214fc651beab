"""Testing the global model: fixed shards of rows, summed in their order. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayfed_lora.types import EvaluationSums


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on one split: share classified correctly, mean cross entropy (nats)."""

    accuracy: float
    loss: float


def shards(rows: int, size: int) -> list[slice]:
    """Cut a split into shards of `size` rows, the last one smaller.

    >>> shards(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def scores(sums: Sequence[EvaluationSums]) -> Scores:
    """Add the sums of all shards, in order.

    >>> scores([EvaluationSums(3, 1.5, 2), EvaluationSums(1, 0.5, 1)])
    Scores(accuracy=0.75, loss=0.5)
    """
    examples = sum(part.examples for part in sums)
    correct = sum(part.correct for part in sums)
    return Scores(correct / examples, sum(part.loss for part in sums) / examples)
