"""A search in its folder: checked, run by Tune, written. Source: this project."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

from rayfed_lora.errors import InterruptedRunError, RayfedError, RunError
from rayfed_lora.launching.this_process import interruptible
from rayfed_lora.pages.search import SearchNews, Watch
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning import tuner
from rayfed_lora.tuning.distributions import grid
from rayfed_lora.tuning.schedulers import scheduler, searcher
from rayfed_lora.tuning.search_folder import write_search
from rayfed_lora.tuning.search_result import SearchResult
from rayfed_lora.tuning.space import Space
from rayfed_lora.tuning.space_checks import invalid_draws, without_effect
from rayfed_lora.tuning.trial import Search
from rayfed_lora.tuning.trial_rows import TrialOutcome
from rayfed_lora.tuning.tune_signals import stop_tune


def run(
    search: Search, folder: RunFolder, watch: Watch, max_concurrent: int | None, resume: bool
) -> SearchResult:
    """Run all trials and write the tables into `folder`, which the lease guards.

    Raises:
        BadInputError: the space does not fit the recipe, the cluster or the installed packages.
        InterruptedRunError: stopped by a signal.
        RunError: no trial has finished, or Tune ended early.
    """
    space, recipe = search.space, search.recipe
    for text in _warnings(space, recipe):
        watch(SearchNews(warning=text))
    # Both raise BadInputError; here this happens before the data are read.
    scheduler(space, recipe)
    searcher(space, recipe, 1)
    trials = len(grid(space, recipe)) if space.search == "grid" else space.samples
    trainable, slots = tuner.trainable(search, min(max_concurrent or trials, trials))
    write_search(folder, space, recipe, max_concurrent)
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        stop_tune()

    with interruptible(stop):
        outcomes = tuner.fit(search, watch, trainable, slots, resume)
    if not stopped.is_set():
        if len(outcomes) < trials:
            raise RunError(f"Tune ended after {len(outcomes)} of {trials} trials; try --resume")
        return _written(search, folder, outcomes)
    with suppress(RayfedError):
        # The tables so far; there are none before the first trial has finished.
        _written(search, folder, outcomes)
    raise InterruptedRunError(
        "stopped; finished trials and the rounds of others are kept; resume with --resume"
        f" --out {shlex.quote(search.location)}"
    )


def _warnings(space: Space, recipe: Recipe) -> Iterator[str]:
    """Yield warnings on invalid draws and draws without effect."""
    invalid = invalid_draws(space, recipe)
    if invalid:
        yield f"about {invalid} of 1,000 draws are not valid recipes; their trials fail"
    ignored = without_effect(space, recipe)
    if ignored:
        yield (
            f"drawn without effect with annealing.mode {recipe.annealing.mode} and the conditions"
            f" of the space: {', '.join(ignored)}"
        )


def _written(search: Search, folder: RunFolder, outcomes: Sequence[TrialOutcome]) -> SearchResult:
    result = SearchResult.of(search.location, search.space, search.recipe, outcomes)
    result.write(search.space, folder)
    return result
