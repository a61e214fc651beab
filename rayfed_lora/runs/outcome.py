"""What a summary says of a run's end and of the exported model. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exported_scores(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return round and scores of the exported model: of the best one where it is kept.

    The round is counted from 0. Empty where the summary has none, as a stranger's may.
    """
    for name in ("kept", "final"):
        if isinstance(summary.get(name), Mapping):
            scores: Mapping[str, Any] = summary[name]
            return scores
    return {}


def kept_model(summary: Mapping[str, Any]) -> str | None:
    """Return a phrase on which model is exported; None: that of the last round, as usual."""
    kept = summary.get("kept")
    if kept is None:
        return None
    value = kept["value"]
    number = "not finite" if value is None else f"{value:.4f}"
    return f"round {kept['round'] + 1}, best validation {kept['by']} {number}"


def ending(summary: Mapping[str, Any]) -> str | None:
    """Return a phrase on what ended a run before its last round; None: nothing did."""
    stopped_by, detail = summary.get("stopped_by"), summary.get("early_stopping")
    if stopped_by is None:
        return None
    rounds = summary["rounds"]
    if detail is None:
        return f"callback {stopped_by} after round {rounds}"
    best = "none was finite" if detail["best"] is None else f"best {detail['best']:.4f}"
    return (
        f"early stopping after round {rounds}: {detail['tests']} tests without a better validation"
        f" {detail['metric']} ({best})"
    )
