"""News of trials from Ray Tune's callbacks, and their outcomes. Source: ray.tune."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError

from rayfed_lora.errors import RayfedError
from rayfed_lora.launching.ray_health import RayHealth
from rayfed_lora.launching.ray_session import RayLostError
from rayfed_lora.locations import child
from rayfed_lora.pages.search_page import SearchNews, Watch
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.distributions import DRAW
from rayfed_lora.tuning.search_result import TrialOutcome

_FAILURE = re.compile(r"^Failure # \d+ .*\n", re.MULTILINE)
# The last line of a traceback, the first that is not indented.
_RAISED = re.compile(r"^(?P<ours>rayfed_lora\.errors\.)?(?:\w+\.)*(?P<kind>\w+): ", re.MULTILINE)
# Not an attribute of Watcher, since Tune pickles its callbacks and restores them on resume.
WATCH: ContextVar[Watch] = ContextVar("watch")
HEALTH: ContextVar[RayHealth] = ContextVar("health")


class SearchLost(BaseException):
    """Its cause is the loss. Not an Exception: Tune would first ask the lost Ray to clean up."""


class Watcher(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Passes every report, end and failure of a trial on to `WATCH`; looks at `HEALTH`."""

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raise a SearchLost where Ray has ended: Tune would wait for it."""
        try:
            HEALTH.get().check()
        except RayLostError as error:
            raise SearchLost from error

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Report the progress of the trials."""
        _notify(trials, newest=(trial, int(result["round"])))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report the result of a trial."""
        metrics = trial.last_result
        accuracy = metrics.get("eval_accuracy")
        how = "" if accuracy is None else f"test accuracy {accuracy:.4f} "
        _notify(trials, trial, f"{how}after {metrics.get('round', 0)} rounds")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report the reason of a failure."""
        # `get_error` would unpickle a copy that does not exist yet.
        text = Path(trial.error_file).read_text("utf-8", errors="replace")
        _notify(trials, trial, f"failed: {reason_in(text)}")


def _notify(
    trials: list[Any],
    ended: Any = None,
    outcome: str = "",
    newest: tuple[Any, int] | None = None,
) -> None:
    """Report the trials: `ended` has just ended with `outcome`, `newest` has done a round."""
    running = {
        trial.trial_id: int(trial.last_result.get("round", 0))
        for trial in trials
        if trial.status == "RUNNING" and trial is not ended
    }
    if newest is not None:
        running[newest[0].trial_id] = newest[1]
    over = sum(trial.is_finished() and trial is not ended for trial in trials)
    news = SearchNews(len(trials), running, done=over)
    if ended is not None:
        drawn = ended.config.get(DRAW, {})
        news = replace(news, ended=(ended.trial_id, outcome), done=over + 1, drawn=drawn)
    WATCH.get()(news)


def outcomes_of(grid: tune.ResultGrid, location: str) -> list[TrialOutcome]:
    """Return the trials of Tune's result; `location` has a folder for each, named by its id."""
    found = []
    for result in grid:
        trial = PurePosixPath(result.path).name
        metrics: Mapping[str, Any] = result.metrics or {}
        config, folder = metrics.get("config"), RunFolder(child(location, trial))
        if not config and folder.exists("params.json"):
            config = json.loads(folder.read("params.json"))
        reason = None if result.error is None else _reason(result.error)
        found.append(TrialOutcome(trial, (config or {}).get(DRAW, {}), metrics, reason))
    return found


def reason_in(text: str) -> str:
    """Return the newest error in Tune's file of failures: headings, a traceback after each."""
    newest = _FAILURE.split(text)[-1]
    last = newest.rpartition("direct cause of the following exception:")[2]
    found = _RAISED.search(last)
    if found is None:
        return last.strip()
    kind, message = found["kind"], last[found.end() :].strip()
    return message if found["ours"] else f"{kind}: {message}"


def _reason(error: Exception) -> str:
    """Return the message of an error, unwrapped where it comes from a Ray task."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayfedError):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"
