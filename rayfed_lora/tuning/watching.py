"""What Tune knows of trials, told to the user while it searches and in the end.

Source: this project, on ray.tune's callbacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError

from rayfed_lora.errors import RayfedError
from rayfed_lora.locations import child
from rayfed_lora.pages.search import SearchNews, Watch
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.drawing import DRAW
from rayfed_lora.tuning.results import Tried

# Tune pickles its callbacks and brings them back from there when it goes on with a search: whom to
# tell is known by who asks for the search.
_FAILURE = re.compile(r"^Failure # \d+ .*\n", re.MULTILINE)
# The last line of a traceback; what it calls from is indented.
_RAISED = re.compile(r"^(?P<ours>rayfed_lora\.errors\.)?(?:\w+\.)*(?P<kind>\w+): ", re.MULTILINE)
WATCH: ContextVar[Watch] = ContextVar("watch")


class Watcher(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Tells of every report and end of a trial."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tell how far the trials are."""
        _tell(trials, newest={trial.trial_id: int(result["round"])})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell what came of a trial."""
        metrics = trial.last_result
        accuracy = metrics.get("eval_accuracy")
        how = "" if accuracy is None else f"accuracy {accuracy:.4f} "
        _tell(trials, (trial.trial_id, f"{how}after {metrics.get('round', 0)} rounds"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell why a trial failed."""
        # Not by `get_error`: that reads a copy which is made later; and no pickle is read here.
        text = Path(trial.error_file).read_text("utf-8", errors="replace")
        _tell(trials, (trial.trial_id, f"failed: {reason_in(text)}"))


def _tell(
    trials: list[Any],
    ended: tuple[str, str] | None = None,
    newest: Mapping[str, int] = MappingProxyType({}),
) -> None:
    running = {
        trial.trial_id: int(trial.last_result.get("round", 0))
        for trial in trials
        if trial.status == "RUNNING" and (ended is None or trial.trial_id != ended[0])
    }
    WATCH.get()(SearchNews(len(trials), {**running, **newest}, ended))


def tried_of(grid: tune.ResultGrid, location: str) -> list[Tried]:
    """Return the trials of Tune's result.

    Args:
        grid: of `Tuner.fit`.
        location: of Tune's own files: a folder a trial, named by its id.
    """
    found = []
    for result in grid:
        trial = PurePosixPath(result.path).name
        metrics: Mapping[str, Any] = result.metrics or {}
        config = metrics.get("config") or _config(RunFolder(child(location, trial)))
        reason = None if result.error is None else _reason(result.error)
        found.append(Tried(trial, config.get(DRAW, {}), metrics, reason))
    return found


def _config(folder: RunFolder) -> Mapping[str, Any]:
    if not folder.exists("params.json"):
        return {}
    config: Mapping[str, Any] = json.loads(folder.read("params.json"))
    return config


def reason_in(text: str) -> str:
    """Return the newest error in the text that Tune keeps of a trial's failures.

    Args:
        text: headings `Failure # 1 (...)`, each with a traceback under it.
    """
    newest = _FAILURE.split(text)[-1]
    last = newest.rpartition("direct cause of the following exception:")[2]
    found = _RAISED.search(last)
    if found is None:
        return last.strip()
    kind, message = found["kind"], last[found.end() :].strip()
    return message if found["ours"] else f"{kind}: {message}"


def _reason(error: Exception) -> str:
    """Return what a user should know of an error that Ray has wrapped."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayfedError):
        return str(cause)
    return f"{type(cause).__name__}: {cause}"
