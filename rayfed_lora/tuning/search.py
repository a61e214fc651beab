"""A search from its space to its tables, on Ray Tune. Source: this project."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.engines.on_ray.placement import Layout, Node, layout, nodes_of
from rayfed_lora.errors import (
    BadInputError,
    InterruptedRunError,
    RayfedError,
    RunError,
    RunFolderError,
)
from rayfed_lora.launching.ray_session import ray_session
from rayfed_lora.launching.signals import interruptible
from rayfed_lora.locations import child
from rayfed_lora.pages.search import SEARCH_FILE, SearchNews, Watch
from rayfed_lora.recipe.layers import override_pairs
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.notes import given_way_in_search, unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml, yaml_text
from rayfed_lora.runs import seals
from rayfed_lora.runs.claiming import check_unused, differences, say
from rayfed_lora.runs.location import run_location, with_absolute_paths
from rayfed_lora.runs.ownership import Ticket, owned
from rayfed_lora.runs.tracking import check_tracking
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.space import Space, check_objectives, load_space

if TYPE_CHECKING:
    from rayfed_lora.tuning.results import SearchResult, Tried

# Tune's own files, in the search's folder.
_TUNE = "tune"
# A trial whose process died goes on with its run folder; one that failed fails again, at once.
_RETRIES = 2
# Copies of a run, of searches that copy runs; with fewer another trial may come too late for one.
_KEPT = 4


def tune(  # noqa: PLR0913 - a user names them
    space: Space | str | Path | Mapping[str, Any],
    recipe: Recipe | str | Path | Mapping[str, Any],
    out: str | None = None,
    *,
    samples: int | None = None,
    scheduler: str | None = None,
    search: str | None = None,
    objectives: Mapping[str, str] | None = None,
    max_concurrent: int | None = None,
    resume: bool = False,
    settings: Sequence[str] | Mapping[str, Any] = (),
    address: str | None = None,
    watch: Watch | None = None,
    factory: Factory | None = None,
) -> SearchResult:
    """Search a space with Ray Tune, one run a trial; write tables, best recipes and a report.

    Args:
        space: a shipped name, a path, or the mapping itself.
        recipe: as for `run`: what is not drawn.
        out: folder or URI; default a new one under `runs/`.
        samples: number of trials, in place of the space's own; likewise the next three.
        scheduler: asha | pbt | median | none.
        search: random | optuna | grid.
        objectives: metric -> max or min.
        max_concurrent: most trials at once; None: as many as the cluster holds.
        resume: go on with the search in `out`; finished trials are not run again.
        settings: overrides of the recipe, as for `--set`.
        address: of a running Ray cluster; default $RAY_ADDRESS, or a Ray of our own.
        watch: called with what is new.
        factory: what workers make of a recipe; for tests.

    Raises:
        BadInputError: refused before anything started.
        InterruptedRunError: stopped by SIGINT; go on with `resume`.
        RunError: no trial has finished.
    """
    changed = {
        "samples": samples,
        "scheduler": scheduler,
        "search": search,
        "objectives": None if objectives is None else dict(objectives),
    }
    if isinstance(space, Space):
        space = space.model_dump()
    space = load_space(space, **changed)
    whole = load_recipe(recipe, settings)
    base = _of_trials(with_absolute_paths(whole))
    if max_concurrent is not None and max_concurrent < 1:
        raise BadInputError(f"--max-concurrent: expected at least 1, got {max_concurrent}")
    if max_concurrent is not None and space.scheduler == "pbt":
        raise BadInputError(
            "--max-concurrent: expected none with scheduler pbt, whose trials take turns where the"
            f" cluster cannot hold all of them; got {max_concurrent}"
        )
    location = run_location(out, f"tune-{base.name}")
    folder = RunFolder(location)
    # Absolutely: trials run in another folder.
    location = location if folder.local is None else str(folder.local)
    check_objectives(space, base)
    check_tracking(base)
    limit = _claim(folder, space, base, max_concurrent, resume)
    # One command at a time: another one would write the same state and tables.
    with owned(folder, Ticket.of_this_process(), wait=resume, tell=say) as (folder, lease):
        _claim(folder, space, base, max_concurrent, resume)
        with ray_session(address), _quiet_tune():
            watch = watch or (lambda news: None)
            idle = (*unused(whole), *given_way_in_search(whole), *_drawn_anyway(space, settings))
            for note in idle:
                watch(SearchNews(warning=note))
            factory = factory or TorchFactory()
            job = _Job(space, base, location, lease.ticket, limit, factory, watch)
            return job.run(folder, resume)


def _drawn_anyway(space: Space, settings: Sequence[str] | Mapping[str, Any]) -> Iterator[str]:
    """Say which settings every trial draws another value for."""
    pairs = settings if isinstance(settings, Mapping) else dict(override_pairs("--set", settings))
    for key in pairs:
        how = space.parameters.get(key)
        if how is not None and not how.when:
            yield f"{key}: the value of --set has no effect, the space draws one for each trial"


def _of_trials(recipe: Recipe) -> Recipe:
    """Return the recipe that trials share: on Ray, in folders of their own."""
    # Whatever ends or copies a trial finds its newest round saved.
    storage = recipe.storage.model_copy(update={"path": None, "checkpoint_every": 1})
    runtime = recipe.runtime.model_copy(update={"executor": "ray"})
    return recipe.model_copy(update={"storage": storage, "runtime": runtime})


def _claim(
    folder: RunFolder, space: Space, recipe: Recipe, max_concurrent: int | None, resume: bool
) -> int | None:
    """Check that a search may use the folder; write nothing but a probe.

    Returns:
        The most trials at once, of the search that is in the folder where there is one: Tune keeps
        to what it began with.

    Raises:
        RunFolderError: it holds a search and `resume` is false, or another search or other files.
    """
    if not folder.exists(SEARCH_FILE):
        check_unused(folder)
        folder.check_writable()
        return max_concurrent
    if not resume:
        raise RunFolderError(
            f"{folder.location} holds a search already; go on with it by --resume, or choose"
            " another --out"
        )
    try:
        kept = parse_yaml(folder.location, seals.text(folder, SEARCH_FILE))
        before, kept_recipe = Space.model_validate(kept["space"]), load_recipe(kept["recipe"])
        limit: int | None = kept["max_concurrent"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(
            f"{child(folder.location, SEARCH_FILE)} cannot be read: {error}"
        ) from None
    fields = Space.model_fields
    changed = [name for name in fields if getattr(before, name) != getattr(space, name)]
    changed += differences(kept_recipe, recipe)
    changed += ["max_concurrent"] * (max_concurrent not in (None, limit))
    if changed:
        raise RunFolderError(
            f"{folder.location} holds another search; these differ: {', '.join(changed)}"
        )
    return limit


def trial_layout(recipe: Recipe, nodes: Sequence[Node], at_once: int) -> tuple[Layout, int]:
    """Return the client actors of one trial, and how many trials fit beside each other.

    With `client_actors: auto` trials share the cluster evenly, one actor each at least: trials
    beside each other wait less than actors of one trial.

    Args:
        recipe: of the trials.
        nodes: of the cluster.
        at_once: most trials at once.

    Raises:
        ResourceError: not even one trial fits.
    """
    most = recipe.cohort_size(recipe.data.partition.clients)
    one = layout(recipe.runtime, nodes, most)
    any_number = recipe.runtime.model_copy(update={"client_actors": "auto"})
    capacity = layout(any_number, nodes, sys.maxsize).actors
    if recipe.runtime.client_actors == "auto":
        one = replace(one, actors=max(1, min(most, capacity // at_once)))
    return one, min(capacity // one.actors, at_once)


class _Job:
    """A search that has a folder and a Ray."""

    def __init__(
        self,
        space: Space,
        recipe: Recipe,
        location: str,
        ticket: Ticket,
        max_concurrent: int | None,
        factory: Factory,
        watch: Watch,
    ) -> None:
        self._space = space
        self._recipe = recipe
        self._location = location
        self._ticket = ticket
        self._max_concurrent = max_concurrent
        self._factory = factory
        self._watch = watch

    def run(self, folder: RunFolder, resume: bool) -> SearchResult:
        from rayfed_lora.tuning import drawing

        refused = drawing.check(self._space, self._recipe)
        if refused:
            self._tell(f"about {refused} of 1,000 draws are no recipes that can run; they fail")
        idle = drawing.without_effect(self._space, self._recipe)
        if idle:
            mode = self._recipe.annealing.mode
            self._tell(
                f"drawn for nothing with annealing.mode {mode} and the conditions of the space:"
                f" {', '.join(idle)}"
            )
        # Refused here, where they cannot be had: data come after.
        drawing.scheduler(self._space, self._recipe)
        drawing.searcher(self._space, self._recipe, 1)
        trials, trainable, slots = self._trainable()
        if not folder.exists(SEARCH_FILE):
            content = {
                "space": self._space.model_dump(mode="json"),
                "recipe": self._recipe.model_dump(mode="json"),
                "max_concurrent": self._max_concurrent,
            }
            folder.write(SEARCH_FILE, seals.sealed_text(yaml_text(content)))
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            _stop_tune()

        with interruptible(stop):
            tried = self._fit(trainable, slots, resume)
        if not stopped.is_set():
            if len(tried) < trials:
                raise RunError(f"Tune ended after {len(tried)} of {trials} trials; try --resume")
            return self._written(folder, tried)
        with suppress(RayfedError):
            # Of what is done; nothing may be.
            self._written(folder, tried)
        raise InterruptedRunError(
            "stopped; finished trials and the rounds of others are kept; go on with --resume"
            f" --out {shlex.quote(self._location)}"
        )

    def _written(self, folder: RunFolder, tried: Sequence[Tried]) -> SearchResult:
        from rayfed_lora.tuning.results import SearchResult

        result = SearchResult.of(self._location, self._space, self._recipe, tried)
        result.write(self._space, folder)
        return result

    def _tell(self, warning: str) -> None:
        self._watch(SearchNews(warning=warning))

    def _trainable(self) -> tuple[int, Any, int]:
        """Return Tune's trainable, once the data are read and a trial is known to fit.

        Returns:
            How many trials there will be, the trainable, and how many can run at once.

        Raises:
            ResourceError: not even one trial fits the cluster.
            DataError, ModelError: data or model cannot be read.
        """
        import ray
        from ray import tune as ray_tune

        from rayfed_lora.engines.on_ray.calls import result
        from rayfed_lora.engines.on_ray.shelf import Shelf
        from rayfed_lora.tuning import drawing
        from rayfed_lora.tuning.trial import Shared, Trial

        space, recipe = self._space, self._recipe
        trials = len(drawing.grid(space, recipe)) if space.search == "grid" else space.samples
        at_once = min(self._max_concurrent or trials, trials)
        actors, slots = trial_layout(recipe, nodes_of(ray.nodes()), at_once)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        shelf = ray.remote(Shelf).options(**options).remote()
        # Before anything starts: a fault in data or model is the user's, not a trial's.
        result(ray.get(shelf.prepared.remote(recipe, self._factory))[0])
        shared = Shared(space, recipe, self._location, self._ticket, actors, shelf, self._factory)
        # The trial's own process computes little: it takes no share.
        group = ray_tune.PlacementGroupFactory(
            [{}, *[actors.bundle] * actors.actors], strategy="PACK"
        )
        trainable = ray_tune.with_parameters(Trial, shared=shared)
        return trials, ray_tune.with_resources(trainable, group), slots

    def _fit(self, trainable: Any, slots: int, resume: bool) -> list[Tried]:
        from ray import tune as ray_tune

        from rayfed_lora.tuning import drawing
        from rayfed_lora.tuning.watching import WATCH, Watcher, tried_of

        space, recipe = self._space, self._recipe
        path = child(self._location, _TUNE)
        folder = RunFolder(path)
        # An object store as we open it: Tune would wait longer for one that does not answer.
        filesystem = None if folder.local is not None else folder.place[0]
        own = folder.place[1]
        param_space = drawing.param_space(space, recipe)
        # Without a state of its trials Tune would begin anew, and with one trial only.
        begun = any(name.startswith("experiment_state") for name in folder.names())
        if resume and begun and ray_tune.Tuner.can_restore(own, filesystem):
            tuner = ray_tune.Tuner.restore(
                own,
                trainable,
                resume_unfinished=True,
                param_space=param_space,
                storage_filesystem=filesystem,
            )
        else:
            tuner = ray_tune.Tuner(
                trainable,
                param_space=param_space,
                tune_config=ray_tune.TuneConfig(
                    num_samples=1 if space.search == "grid" else space.samples,
                    search_alg=drawing.searcher(space, recipe, slots),
                    scheduler=drawing.scheduler(space, recipe),
                    reuse_actors=True,
                    trial_dirname_creator=_folder_name,
                ),
                run_config=ray_tune.RunConfig(
                    name=_TUNE,
                    storage_path=str(PurePosixPath(own).parent),
                    storage_filesystem=filesystem,
                    verbose=0,
                    failure_config=ray_tune.FailureConfig(max_failures=_RETRIES),
                    # A run folder needs no copy, but where another trial goes on with it.
                    checkpoint_config=ray_tune.CheckpointConfig(
                        num_to_keep=_KEPT, checkpoint_at_end=False
                    ),
                    callbacks=[Watcher()],
                ),
            )
        watching = WATCH.set(self._watch)
        try:
            return tried_of(tuner.fit(), path)
        finally:
            WATCH.reset(watching)


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


def _stop_tune() -> None:
    """Let Tune save its state and end; before it is there, end at once."""
    if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, None):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGUSR1)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Let our own lines say what happens, and our own handler take SIGINT."""
    # Tune's newer output cannot be told to be silent.
    ours = {"TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    logger = logging.getLogger("ray.tune")
    level, handler = logger.level, signal.getsignal(signal.SIGUSR1)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            # Tune leaves its own one behind.
            signal.signal(signal.SIGUSR1, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
