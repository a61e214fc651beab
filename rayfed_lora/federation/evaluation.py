"""Testing a model: fixed shards of rows, and metrics over them in their order.

A metric is one function below; each is a column `eval_<name>` of rounds.parquet.

Source: macro F1 and one-vs-rest AUC as in scikit-learn (which the tests compare with; importing it
here would cost the server 90 MB): Hand and Till 2001, Machine Learning 45:171, for the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rayfed_lora.types import Predictions

# Shards that a split has at least, where they have so many rows.
_SHARDS_TO_SHARE = 4
_FEW_ROWS = 64

# Metrics of one model on one split, by name; None where one is not defined.
Scores = Mapping[str, float | None]


def shards(rows: int, size: int) -> tuple[slice, ...]:
    """Cut a split into shards of at most `size` rows, of equal size give or take one row.

    There are a few even if one would do, so that several workers share a test.

    >>> shards(5, 2)
    (slice(0, 1, None), slice(1, 3, None), slice(3, 5, None))
    >>> shards(200, 256)
    (slice(0, 66, None), slice(66, 133, None), slice(133, 200, None))
    """
    count = max(math.ceil(rows / size), min(_SHARDS_TO_SHARE, rows // _FEW_ROWS))
    edges = [i * rows // count for i in range(count + 1)]
    return tuple(slice(low, high) for low, high in pairwise(edges))


class Outcome:
    """The predictions of a model on all shards of a split.

    Attributes:
        shards: in order.
    """

    def __init__(self, shards: Sequence[Predictions]) -> None:
        """Take the shards."""
        self.shards = shards

    @cached_property
    def predicted(self) -> int:
        """Number of predictions: examples, or tokens of texts."""
        return int(sum(shard.predicted.sum() for shard in self.shards))

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """(n,) true classes; None of texts that are continued."""
        labels = np.concatenate([shard.labels for shard in self.shards])
        return None if np.any(labels < 0) else labels

    @cached_property
    def classes(self) -> npt.NDArray[np.int64]:
        """(n,) predicted classes."""
        return np.concatenate([shard.classes for shard in self.shards])

    @cached_property
    def probabilities(self) -> npt.NDArray[np.floating] | None:
        """(n, classes); None where a shard has none."""
        found = [s.probabilities for s in self.shards if s.probabilities is not None]
        return np.concatenate(found) if len(found) == len(self.shards) else None


METRICS: dict[str, Callable[[Outcome], float | None]] = {}


def metric(function: Callable[[Outcome], float | None]) -> Callable[[Outcome], float | None]:
    """Register a metric under its function's name."""
    METRICS[function.__name__] = function
    return function


def scores(shards: Sequence[Predictions]) -> Scores:
    """Return all metrics over all shards, in order."""
    outcome = Outcome(shards)
    return {name: function(outcome) for name, function in METRICS.items()}


@metric
def accuracy(outcome: Outcome) -> float:
    """Return the share that is predicted correctly."""
    return int(sum(shard.correct.sum() for shard in outcome.shards)) / outcome.predicted


@metric
def loss(outcome: Outcome) -> float:
    """Return the mean cross entropy, nats."""
    total = math.fsum(math.fsum(shard.losses.tolist()) for shard in outcome.shards)
    return total / outcome.predicted


@metric
def macro_f1(outcome: Outcome) -> float | None:
    """Return the mean F1 over the classes that occur or are predicted; None without classes."""
    labels = outcome.labels
    return None if labels is None else mean_f1(labels, outcome.classes)


@metric
def auc(outcome: Outcome) -> float | None:
    """Return the mean area under the ROC curve of each class against the rest.

    None where no class occurs beside others, and without probabilities.
    """
    labels, probabilities = outcome.labels, outcome.probabilities
    if labels is None or probabilities is None:
        return None
    return one_vs_rest_auc(labels, probabilities)


@metric
def perplexity(outcome: Outcome) -> float | None:
    """Return exp(loss), of language models only."""
    if outcome.labels is not None:
        return None
    nats = loss(outcome)
    return None if nats is None else math.exp(nats) if nats < 700.0 else math.inf


def mean_f1(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN).

    >>> round(mean_f1(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])), 4)
    0.7333
    """
    size = int(max(labels.max(), predicted.max())) + 1
    hits = np.bincount(labels[labels == predicted], minlength=size)
    sums = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)
    occurs = sums > 0
    return float(np.mean(2.0 * hits[occurs] / sums[occurs]))


def one_vs_rest_auc(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.floating]
) -> float | None:
    """Return the mean one-vs-rest AUC; None where no class has others beside it, or a nan.

    Args:
        labels: (n,).
        probabilities: (n, classes).

    >>> one_vs_rest_auc(np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]))
    0.5
    """
    if not np.isfinite(probabilities).all():
        return None
    found = []
    for c in range(probabilities.shape[1]):
        own = labels == c
        positive = int(own.sum())
        negative = len(own) - positive
        if positive and negative:
            # Mann and Whitney's U from mean ranks, ties counting half.
            _, place, count = np.unique(
                probabilities[:, c], return_inverse=True, return_counts=True
            )
            ranks = (np.cumsum(count) - (count - 1) / 2)[place]
            above = ranks[own].sum() - positive * (positive + 1) / 2
            found.append(float(above) / (positive * negative))
    return float(np.mean(found)) if found else None
