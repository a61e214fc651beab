"""A search that owns its folder: checked, run by Ray Tune, its tables written.

Source: this project.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from contextlib import suppress

from rayfed_lora.errors import InterruptedRunError, RayfedError, RunError
from rayfed_lora.launching import launch
from rayfed_lora.tuning import tuner
from rayfed_lora.tuning.distributions import grid
from rayfed_lora.tuning.schedulers import scheduler, searcher
from rayfed_lora.tuning.search_folder import write_search
from rayfed_lora.tuning.search_result import SearchResult
from rayfed_lora.tuning.space_checks import invalid_draws, without_effect
from rayfed_lora.tuning.trial_rows import TrialOutcome
from rayfed_lora.tuning.tune_signals import stop_tune
from rayfed_lora.tuning.tuner import Search


def run(search: Search, resume: bool) -> SearchResult:
    """Run all trials and write the tables.

    Args:
        search: the search.
        resume: continue from Tune's saved state, if present.

    Raises:
        BadInputError: the space does not fit the recipe, the cluster or the installed packages.
        InterruptedRunError: stopped by a signal.
        RunError: no trial has finished, or Tune ended early.
    """
    space, recipe = search.space, search.recipe
    _check(search)
    trials = len(grid(space, recipe)) if space.search == "grid" else space.samples
    trainable, slots = tuner.trainable(search, min(search.max_concurrent or trials, trials))
    write_search(search.folder, space, recipe, search.max_concurrent)
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        stop_tune()

    with launch.interruptible(stop):
        outcomes = tuner.fit(search, trainable, slots, resume)
    if not stopped.is_set():
        if len(outcomes) < trials:
            raise RunError(f"Tune ended after {len(outcomes)} of {trials} trials; try --resume")
        return _written(search, outcomes)
    with suppress(RayfedError):
        # The tables so far; there are none before the first trial has finished.
        _written(search, outcomes)
    raise InterruptedRunError(
        "stopped; finished trials and the rounds of others are kept; resume with --resume"
        f" --out {shlex.quote(search.location)}"
    )


def _check(search: Search) -> None:
    """Warn of draws without effect or validity, and reject a space that Tune cannot search."""
    space, recipe = search.space, search.recipe
    invalid = invalid_draws(space, recipe)
    if invalid:
        search.warn(f"about {invalid} of 1,000 draws are not valid recipes; their trials fail")
    ignored = without_effect(space, recipe)
    if ignored:
        search.warn(
            f"drawn without effect with annealing.mode {recipe.annealing.mode} and the conditions"
            f" of the space: {', '.join(ignored)}"
        )
    # Both raise BadInputError; here this happens before the data are read.
    scheduler(space, recipe)
    searcher(space, recipe, 1)


def _written(search: Search, outcomes: Sequence[TrialOutcome]) -> SearchResult:
    result = SearchResult.of(search.location, search.space, search.recipe, outcomes)
    result.write(search.space, search.folder)
    return result
