"""Testing a model: fixed shards of rows, and metrics over them in their order.

A metric is one function below; each is a column `eval_<name>` of rounds.parquet.

Source: macro F1 and one-vs-rest AUC as in scikit-learn (which the tests compare with; importing it
here would cost the server 90 MB): Hand and Till 2001, Machine Learning 45:171, for the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rayfed_lora.types import Predictions

# Minimum number of shards of a split, as far as they have so many rows.
_SHARDS_TO_SHARE = 4
_FEW_ROWS = 64

# Metrics of one model on one split, by name; None where a metric is not defined.
Scores = Mapping[str, float | None]


def shards(rows: int, size: int) -> tuple[slice, ...]:
    """Cut a split into shards of at most `size` rows whose sizes differ by at most one row.

    There are a few even if one were enough, so that several workers share a test.

    >>> shards(5, 2)
    (slice(0, 1, None), slice(1, 3, None), slice(3, 5, None))
    >>> shards(200, 256)
    (slice(0, 66, None), slice(66, 133, None), slice(133, 200, None))
    """
    count = max(math.ceil(rows / size), min(_SHARDS_TO_SHARE, rows // _FEW_ROWS))
    edges = [i * rows // count for i in range(count + 1)]
    return tuple(slice(low, high) for low, high in pairwise(edges))


# The predictions of a model on all shards of a split, in order.
Shards = Sequence[Predictions]
METRICS: dict[str, Callable[[Shards], float | None]] = {}


def metric(function: Callable[[Shards], float | None]) -> Callable[[Shards], float | None]:
    """Register a metric under its function's name."""
    METRICS[function.__name__] = function
    return function


def scores(shards: Shards) -> Scores:
    """Return all metrics over all shards, in order."""
    return {name: function(shards) for name, function in METRICS.items()}


def _predicted(shards: Shards) -> int:
    """Return the number of predictions: examples, or tokens of texts."""
    return int(sum(shard.predicted.sum() for shard in shards))


def _labels(shards: Shards) -> npt.NDArray[np.int64] | None:
    """Return (n,) true classes; None for language modelling."""
    labels = np.concatenate([shard.labels for shard in shards])
    return None if np.any(labels < 0) else labels


@metric
def accuracy(shards: Shards) -> float:
    """Return the share of correct predictions."""
    return int(sum(shard.correct.sum() for shard in shards)) / _predicted(shards)


@metric
def loss(shards: Shards) -> float | None:
    """Return the mean cross entropy, nats."""
    total = math.fsum(math.fsum(shard.losses.tolist()) for shard in shards)
    return total / _predicted(shards)


@metric
def macro_f1(shards: Shards) -> float | None:
    """Return the mean F1 over the classes that occur or are predicted; None without classes."""
    labels = _labels(shards)
    return None if labels is None else mean_f1(labels, np.concatenate([s.classes for s in shards]))


@metric
def auc(shards: Shards) -> float | None:
    """Return the mean area under the ROC curve of each class against the rest.

    None where no class occurs beside others, and without probabilities.
    """
    labels = _labels(shards)
    found = [s.probabilities for s in shards if s.probabilities is not None]
    if labels is None or len(found) < len(shards):
        return None
    return one_vs_rest_auc(labels, np.concatenate(found))


@metric
def perplexity(shards: Shards) -> float | None:
    """Return exp(loss), for language models only."""
    if _labels(shards) is not None:
        return None
    nats = loss(shards)
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
    """Return the mean one-vs-rest AUC; None where no class has others beside it, or with a nan.

    Shapes: (n,) labels, (n, classes) probabilities.

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
            column = probabilities[:, c]
            _, place, count = np.unique(column, return_inverse=True, return_counts=True)
            ranks = (np.cumsum(count) - (count - 1) / 2)[place]
            above = ranks[own].sum() - positive * (positive + 1) / 2
            found.append(float(above) / (positive * negative))
    return float(np.mean(found)) if found else None
