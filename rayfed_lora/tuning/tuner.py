"""A search in Ray Tune: trainable, resources, Tuner. Source: this project, on ray.tune."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import ray
from ray import tune

from rayfed_lora.engines.on_ray.calls import result
from rayfed_lora.engines.on_ray.placement import Layout, Node, layout, nodes_of
from rayfed_lora.engines.on_ray.shelf import Shelf
from rayfed_lora.launching.ray_health import RayHealth
from rayfed_lora.locations import child
from rayfed_lora.pages.search_page import Watch
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.distributions import param_space
from rayfed_lora.tuning.schedulers import scheduler, searcher
from rayfed_lora.tuning.search_result import TrialOutcome
from rayfed_lora.tuning.trial import Search, Trial
from rayfed_lora.tuning.watching import HEALTH, WATCH, SearchLost, Watcher, outcomes_of

# Tune's own files, in the search's folder.
_FOLDER = "tune"
# A trial whose process died resumes from its run folder; a failed one fails again at once.
_RETRIES = 2
# Copies of each run in searches that copy runs; with fewer, Tune may delete one before its use.
_COPIES = 4


def trial_layout(recipe: Recipe, nodes: Sequence[Node], at_once: int) -> tuple[Layout, int]:
    """Return the client actors of one trial, and how many trials fit the cluster at once.

    At most `at_once` trials run at once. With `client_actors: auto` they share the cluster evenly,
    with at least one actor each: concurrent trials wait less than the actors of one trial.

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
    """Read data and base model once for all trials; return Tune's trainable.

    Also returned is the number of trials that can run at once, up to `at_once`.

    Raises:
        ResourceError: not even one trial fits the cluster.
        DataError, ModelError: data or model cannot be read.
    """
    actors, slots = trial_layout(search.recipe, nodes_of(ray.nodes()), at_once)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    shelf = ray.remote(Shelf).options(**options).remote()
    # A fault in data or model ends the search here, not in each trial.
    result(ray.get(shelf.prepared.remote(search.recipe, search.factory))[0])
    trial = tune.with_parameters(Trial, search=search, layout=actors, shelf=shelf)
    # The trial's own process computes little, so it reserves nothing.
    group = tune.PlacementGroupFactory([{}, *[actors.bundle] * actors.actors], strategy="PACK")
    return tune.with_resources(trial, group), slots


def _folder_name(trial: Any) -> str:
    """Return a trial's folder; a saved search refers to this function by its name."""
    return str(trial.trial_id)


def fit(
    search: Search, watch: Watch, trainable: Any, slots: int, resume: bool
) -> list[TrialOutcome]:
    """Run `slots` trials at a time until Tune ends; `resume` continues a saved state."""
    space, recipe = search.space, search.recipe
    location = child(search.location, _FOLDER)
    folder = RunFolder(location)
    # Tune's own filesystem would wait longer for an object store that does not answer.
    filesystem, path = folder.place
    filesystem = filesystem if folder.local is None else None
    drawn = param_space(space, recipe)
    # Without a saved state of its trials, Tune would restore a search of a single new trial.
    saved = any(name.startswith("experiment_state") for name in folder.names())
    if resume and saved and tune.Tuner.can_restore(path, filesystem):
        tuner = tune.Tuner.restore(
            path, trainable, param_space=drawn, storage_filesystem=filesystem
        )
    else:
        # The run folder is the checkpoint; copies are only for trials that continue it.
        copies = tune.CheckpointConfig(num_to_keep=_COPIES, checkpoint_at_end=False)
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
                checkpoint_config=copies,
                callbacks=[Watcher()],
            ),
        )
    again = f"resume with --resume --out {shlex.quote(search.location)}"
    token, health = WATCH.set(watch), HEALTH.set(RayHealth(again))
    try:
        return outcomes_of(tuner.fit(), location)
    except SearchLost as lost:
        raise (lost.__cause__ or lost) from None
    finally:
        WATCH.reset(token)
        HEALTH.reset(health)
