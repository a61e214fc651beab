"""A search in its folder: checked, run by Ray Tune, stopped, written. Source: this project."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

from rayfed_lora.errors import InterruptedRunError, RayfedError, RunError
from rayfed_lora.launching.this_process import interruptible
from rayfed_lora.pages.search_page import SearchNews, Watch
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning import tuner
from rayfed_lora.tuning.distributions import grid, invalid_draws, without_effect
from rayfed_lora.tuning.schedulers import scheduler, searcher
from rayfed_lora.tuning.search_folders import write_search
from rayfed_lora.tuning.search_result import SearchResult, drawn_values
from rayfed_lora.tuning.space import Space
from rayfed_lora.tuning.trial import Search

_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's newer output cannot be silenced
}


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Silence Ray Tune's output and leave SIGINT to our own handler."""
    before = {name: os.environ.pop(name) for name in _ENVIRONMENT if name in os.environ}
    os.environ.update(_ENVIRONMENT)
    logger = logging.getLogger("ray.tune")
    level, handler = logger.level, signal.getsignal(signal.SIGUSR1)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            # Tune does not restore the handler.
            signal.signal(signal.SIGUSR1, handler)
        for name in _ENVIRONMENT:
            del os.environ[name]
        os.environ.update(before)


@_quiet_tune()
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

    def tell(news: SearchNews) -> None:
        """Pass news on with the recipe values of a draw, and what Tune does not know."""
        drawn = drawn_values(space, recipe, news.drawn) if news.drawn else {}
        drawn = {key: value for key, value in drawn.items() if value is not None}
        rounds = recipe.annealing.total_rounds
        watch(replace(news, trials=trials, rounds=rounds, drawn=drawn))

    def stop() -> None:
        stopped.set()
        if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, None):
            # Tune has not started.
            raise KeyboardInterrupt
        # Tune saves its state and ends.
        signal.raise_signal(signal.SIGUSR1)

    with interruptible(stop):
        outcomes = tuner.fit(search, tell, trainable, slots, resume)
    if not stopped.is_set() and len(outcomes) < trials:
        raise RunError(f"Tune ended after {len(outcomes)} of {trials} trials; try --resume")
    # After a stop, the tables so far; there are none before the first trial has finished.
    with suppress(RayfedError) if stopped.is_set() else nullcontext():
        result = SearchResult.of(search.location, space, recipe, outcomes)
        result.write(space, folder)
    if stopped.is_set():
        raise InterruptedRunError(
            f"stopped; finished trials and the rounds of others are kept in {search.location};"
            " --resume continues"
        )
    return result


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
