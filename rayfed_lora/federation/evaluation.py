"""Testing a model: fixed shards of rows, and metrics over them in their order.

A metric is one decorated function: a column `eval_<name>` of rounds.parquet. The built-in ones are
always computed, others where `evaluation.metrics` names them.

Source: macro F1 and one-vs-rest AUC as in scikit-learn (which the tests compare with; importing it
here would cost the server 90 MB): Hand and Till 2001, Machine Learning 45:171, for the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.errors import PluginError
from rayfed_lora.plugins import tables
from rayfed_lora.plugins.calls import own_method
from rayfed_lora.plugins.registry import Table
from rayfed_lora.types import Predictions

# Minimum number of shards of a split, as far as they have so many rows.
_SHARDS_TO_SHARE = 4
_FEW_ROWS = 64

# Metrics of one model on one split, by name; None where a metric is not defined.
Scores = Mapping[str, float | None]
# Predictions of a model on all shards of a split, in order.
SplitPredictions = Sequence[Predictions]


@dataclass(frozen=True)
class Metric:
    """A metric of one model on one split.

    Attributes:
        compute: from the predictions on all shards, in order; None where it is not defined.
        higher_is_better: which of two values is better.
    """

    compute: Callable[..., float | None]
    higher_is_better: bool


METRICS: Table[Metric] = tables.METRICS


def metric(
    name: str | None = None, *, higher_is_better: bool = True
) -> Callable[[Callable[..., float | None]], Any]:
    """Register a metric: a function of the predictions on all shards of a split, in order.

    Args:
        name: the column is `eval_<name>`; default: the function's.
        higher_is_better: which of two values is better.

    Raises:
        PluginError: the name is taken, or is no name of a column.
    """

    def register(function: Callable[..., float | None]) -> Any:
        own = name or function.__name__
        if not own.isidentifier():
            raise PluginError(f"metric {own!r}: expected a name such as balanced_accuracy")
        return METRICS.add(function, own, value=lambda _: Metric(function, higher_is_better))

    return register


def joined(parts: SplitPredictions) -> Predictions:
    """Return the predictions on all shards as one, (n,) arrays in the order of the split."""
    fields = ("labels", "losses", "correct", "predicted", "classes")
    arrays = {field: np.concatenate([getattr(part, field) for part in parts]) for field in fields}
    found = [part.probabilities for part in parts if part.probabilities is not None]
    whole = np.concatenate(found) if len(found) == len(parts) else None
    return Predictions(**arrays, probabilities=whole)


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


def _predicted(parts: SplitPredictions) -> int:
    """Return the number of predictions: examples, or tokens of texts."""
    return int(sum(part.predicted.sum() for part in parts))


def _labels(parts: SplitPredictions) -> npt.NDArray[np.int64] | None:
    """Return (n,) true classes; None for language modelling."""
    labels = np.concatenate([part.labels for part in parts])
    return None if np.any(labels < 0) else labels


@metric()
def accuracy(parts: SplitPredictions) -> float:
    """Return the share of correct predictions."""
    return int(sum(part.correct.sum() for part in parts)) / _predicted(parts)


@metric(higher_is_better=False)
def loss(parts: SplitPredictions) -> float:
    """Return the mean cross entropy, nats."""
    total = math.fsum(math.fsum(part.losses.tolist()) for part in parts)
    return total / _predicted(parts)


@metric()
def macro_f1(parts: SplitPredictions) -> float | None:
    """Return the mean F1 over the classes that occur or are predicted; None without classes."""
    labels, classes = _labels(parts), np.concatenate([part.classes for part in parts])
    return None if labels is None else mean_f1(labels, classes)


@metric()
def auc(parts: SplitPredictions) -> float | None:
    """Return the mean area under the ROC curve of each class against the rest.

    None where no class occurs beside others, and without probabilities.
    """
    labels = _labels(parts)
    found = [part.probabilities for part in parts if part.probabilities is not None]
    if labels is None or len(found) < len(parts):
        return None
    return one_vs_rest_auc(labels, np.concatenate(found))


@metric(higher_is_better=False)
def perplexity(parts: SplitPredictions) -> float | None:
    """Return exp(loss), for language models only."""
    if _labels(parts) is not None:
        return None
    nats = loss(parts)
    return math.exp(nats) if nats < 700.0 else math.inf


BUILT_IN = ("accuracy", "loss", "macro_f1", "auc", "perplexity")


def scores(parts: SplitPredictions, own: Sequence[str] = (), round_index: int = 0) -> Scores:
    """Return the built-in metrics over all shards, in order, and some others, by name.

    Raises:
        RunError: another metric raised in this round, or returned no number.
    """
    found = {name: METRICS[name].compute(parts) for name in BUILT_IN}
    for name in own:
        with own_method("metric", name, round_index):
            value = METRICS[name].compute(parts)
            if value is not None and not isinstance(value, (int, float, np.number)):
                raise TypeError(f"expected a number or None, got {value!r}")
            found[name] = None if value is None else float(value)
    return found


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
