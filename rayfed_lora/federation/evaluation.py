"""Testing a model: fixed shards of rows, and metrics over them in their order.

Source: macro F1 and one-vs-rest AUC as in scikit-learn (which the tests compare with; importing it
here would cost the server 90 MB): Hand and Till 2001, Machine Learning 45:171, for the latter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rayfed_lora.types import Predictions

# Shards that a split has at least, where they have so many rows.
_SHARDS_TO_SHARE = 4
_FEW_ROWS = 64


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on one split.

    Attributes:
        accuracy: share predicted correctly.
        loss: mean cross entropy, nats.
        macro_f1: mean F1 over the classes that occur or are predicted; None without classes.
        auc: mean area under the ROC curve of each class against the rest, over the classes that
            occur beside others; None where there is none, or without probabilities.
        perplexity: exp(loss), of language models only.
    """

    accuracy: float
    loss: float
    macro_f1: float | None = None
    auc: float | None = None
    perplexity: float | None = None


def shards(rows: int, size: int) -> list[slice]:
    """Cut a split into shards of at most `size` rows, as large as each other, to one.

    There are a few even if one would do: for who is done with a round before the others.

    >>> shards(5, 2)
    [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    >>> shards(200, 256)
    [slice(0, 66, None), slice(66, 133, None), slice(133, 200, None)]
    """
    count = max(math.ceil(rows / size), min(_SHARDS_TO_SHARE, rows // _FEW_ROWS))
    edges = [i * rows // count for i in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(edges)]


def scores(parts: Sequence[Predictions]) -> Scores:
    """Return the metrics over all shards, in order."""
    predicted = int(sum(part.predicted.sum() for part in parts))
    loss = math.fsum(math.fsum(part.losses.tolist()) for part in parts) / predicted
    accuracy = int(sum(part.correct.sum() for part in parts)) / predicted
    labels = np.concatenate([part.labels for part in parts])
    if np.any(labels < 0):
        return Scores(accuracy, loss, perplexity=_exp(loss))
    classes = np.concatenate([part.classes for part in parts])
    held = [part.probabilities for part in parts if part.probabilities is not None]
    complete = len(held) == len(parts)
    return Scores(
        accuracy,
        loss,
        macro_f1=macro_f1(labels, classes),
        auc=auc(labels, np.concatenate(held)) if complete else None,
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf


def macro_f1(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN).

    >>> round(macro_f1(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])), 4)
    0.7333
    """
    size = int(max(labels.max(), predicted.max())) + 1
    hits = np.bincount(labels[labels == predicted], minlength=size)
    sums = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)
    occurs = sums > 0
    return float(np.mean(2.0 * hits[occurs] / sums[occurs]))


def auc(labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.floating]) -> float | None:
    """Return the mean one-vs-rest AUC; None where no class has others beside it, or a nan.

    Args:
        labels: (n,).
        probabilities: (n, classes).

    >>> auc(np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]))
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
