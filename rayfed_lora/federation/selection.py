"""Early stopping and the best model so far, by metrics on the validation split.

Source: Prechelt, "Early Stopping - But When?", 1998, for the criterion: no improvement in some
number of tests. Never the test split: a model that was chosen by it would look better than it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rayfed_lora.federation.evaluation import METRICS, Scores
from rayfed_lora.recipe.runtime import Evaluation
from rayfed_lora.types import GlobalModel

EARLY_STOPPING = "early-stopping"


@dataclass(frozen=True)
class Kept:
    """The best model so far, after `round`, counted from 0; `value` is its metric."""

    round: int
    value: float
    model: GlobalModel


@dataclass(frozen=True)
class Selection:
    """Which model of a run is the result, and whether the run ends.

    Attributes:
        kept: the best model so far, where the recipe keeps it.
        best: best value of the metric of early stopping; None before the first.
        waited: number of tests since then.
        stopped_by: what ends the run: early stopping, or the name of a callback.
        asked_by: the first callback that asked for the end; the run goes on until it is tested.
    """

    kept: Kept | None = None
    best: float | None = None
    waited: int = 0
    stopped_by: str | None = None
    asked_by: str | None = None

    def after(
        self, settings: Evaluation, round_index: int, model: GlobalModel, scores: Scores | None
    ) -> Selection:
        """Return the selection after a round.

        Args:
            settings: what to watch.
            round_index: from 0.
            model: after the round.
            scores: of the model on the validation split; None: it was not tested.
        """
        if scores is None:
            return self
        new, stopping = self, settings.early_stopping
        if settings.keep_best is not None:
            value = scores[settings.keep_best]
            before = None if self.kept is None else self.kept.value
            if value is not None and _better(settings.keep_best, value, before):
                new = replace(new, kept=Kept(round_index, value, model))
        if stopping is None:
            return new
        value = scores[stopping.metric]
        if value is not None and _better(stopping.metric, value, self.best, stopping.min_delta):
            return replace(new, best=value, waited=0)
        waited = self.waited + 1
        ends = EARLY_STOPPING if waited >= stopping.patience else self.stopped_by
        return replace(new, waited=waited, stopped_by=ends)


def _better(metric: str, value: float, before: float | None, by: float = 0.0) -> bool:
    """Return whether a value is better by more than `by`; a tie is not, nor is one not finite."""
    if not math.isfinite(value):
        return False
    if before is None:
        return True
    return value > before + by if METRICS[metric].higher_is_better else value < before - by
