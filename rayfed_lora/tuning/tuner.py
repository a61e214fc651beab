"""A search in Ray Tune: the trainable with its resources, and the Tuner.

Source: this project, on ray.tune.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import ray
from ray import tune

from rayfed_lora.engines.factory import Factory
from rayfed_lora.engines.on_ray.placement import Layout, Node, layout, nodes_of
from rayfed_lora.engines.on_ray.pool import result
from rayfed_lora.engines.on_ray.shelf import Shelf
from rayfed_lora.locations import child
from rayfed_lora.pages.search import SearchNews, Watch
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.ownership import Ticket
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.distributions import param_space
from rayfed_lora.tuning.schedulers import scheduler, searcher
from rayfed_lora.tuning.space import Space
from rayfed_lora.tuning.trial import Shared, Trial
from rayfed_lora.tuning.trial_rows import TrialOutcome
from rayfed_lora.tuning.watching import WATCH, Watcher, outcomes_of

# Tune's own files, in the search's folder.
_FOLDER = "tune"
# A trial whose process died resumes from its run folder; a failed one fails again at once.
_RETRIES = 2
# Copies of each run in searches that copy runs; with fewer, Tune may delete one before its use.
_COPIES = 4


@dataclass(frozen=True)
class Search:
    """A search in a running Ray.

    Attributes:
        space: the distributions.
        recipe: supplies the values that are not drawn.
        location: of the search's folder.
        folder: that folder, guarded by the lease of this process.
        ticket: of the process that owns the folder.
        max_concurrent: maximum number of concurrent trials; None: as many as fit.
        factory: makes workloads and trainers in the workers.
        watch: called with news of the search.
    """

    space: Space
    recipe: Recipe
    location: str
    folder: RunFolder
    ticket: Ticket
    max_concurrent: int | None
    factory: Factory
    watch: Watch

    def warn(self, text: str) -> None:
        """Tell the user something that does not stop the search."""
        self.watch(SearchNews(warning=text))


def trial_layout(recipe: Recipe, nodes: Sequence[Node], at_once: int) -> tuple[Layout, int]:
    """Return the client actors of one trial, and how many trials fit the cluster at once.

    With `client_actors: auto` trials share the cluster evenly, with at least one actor each:
    concurrent trials wait less than the actors of one trial.

    Args:
        recipe: of the trials.
        nodes: of the cluster.
        at_once: maximum number of concurrent trials.

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


def trainable(search: Search, at_once: int) -> tuple[Any, int]:
    """Read data and base model once for all trials, and return Tune's trainable.

    Args:
        search: the search.
        at_once: maximum number of concurrent trials.

    Returns:
        The trainable, and the number of trials that can run at once.

    Raises:
        ResourceError: not even one trial fits the cluster.
        DataError, ModelError: data or model cannot be read.
    """
    recipe = search.recipe
    actors, slots = trial_layout(recipe, nodes_of(ray.nodes()), at_once)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    shelf = ray.remote(Shelf).options(**options).remote()
    # A fault in data or model ends the search here, not in each trial.
    result(ray.get(shelf.prepared.remote(recipe, search.factory))[0])
    shared = Shared(
        search.space, recipe, search.location, search.ticket, actors, shelf, search.factory
    )
    # The trial's own process computes little, so it reserves nothing.
    group = tune.PlacementGroupFactory([{}, *[actors.bundle] * actors.actors], strategy="PACK")
    return tune.with_resources(tune.with_parameters(Trial, shared=shared), group), slots


def fit(search: Search, trainable: Any, slots: int, resume: bool) -> list[TrialOutcome]:
    """Run Tune to its end, or to a signal (`stop_tune`).

    Args:
        search: the search.
        trainable: the result of `trainable`.
        slots: number of trials that can run at once.
        resume: continue from Tune's saved state, if present.
    """
    space, recipe = search.space, search.recipe
    location = child(search.location, _FOLDER)
    folder = RunFolder(location)
    # Tune's own filesystem would wait longer for an object store that does not answer.
    filesystem = None if folder.local is not None else folder.place[0]
    path = folder.place[1]
    drawn = param_space(space, recipe)
    # Without a saved state of its trials, Tune would restore a search of a single new trial.
    saved = any(name.startswith("experiment_state") for name in folder.names())
    if resume and saved and tune.Tuner.can_restore(path, filesystem):
        tuner = tune.Tuner.restore(
            path,
            trainable,
            resume_unfinished=True,
            param_space=drawn,
            storage_filesystem=filesystem,
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=drawn,
            tune_config=tune.TuneConfig(
                num_samples=1 if space.search == "grid" else space.samples,
                search_alg=searcher(space, recipe, slots),
                scheduler=scheduler(space, recipe),
                reuse_actors=True,
                trial_dirname_creator=_folder_name,
            ),
            run_config=tune.RunConfig(
                name=_FOLDER,
                storage_path=str(PurePosixPath(path).parent),
                storage_filesystem=filesystem,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                # The run folder is the checkpoint; copies are only for trials that continue it.
                checkpoint_config=tune.CheckpointConfig(
                    num_to_keep=_COPIES, checkpoint_at_end=False
                ),
                callbacks=[Watcher()],
            ),
        )
    token = WATCH.set(search.watch)
    try:
        return outcomes_of(tuner.fit(), location)
    finally:
        WATCH.reset(token)


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)
