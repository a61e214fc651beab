"""`rayfed_lora.tune`: a search from its space to its tables. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.errors import BadInputError
from rayfed_lora.launching.harness import refuse
from rayfed_lora.launching.in_memory import check_held, data_settings, with_held
from rayfed_lora.launching.ray_session import ray_session
from rayfed_lora.pages.search_page import SearchNews, Watch
from rayfed_lora.recipe.loading import load_recipe, override_pairs
from rayfed_lora.recipe.notes import given_way_in_search, unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.claiming import say
from rayfed_lora.runs.location import job_id, run_location, with_absolute_paths
from rayfed_lora.runs.ownership import Ticket, owned
from rayfed_lora.runs.resuming import refuse_missing
from rayfed_lora.runs.trackers import check_tracking
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.search_folders import claim_search
from rayfed_lora.tuning.space import Space, check_objectives, load_space

if TYPE_CHECKING:
    from rayfed_lora.tuning.search_result import SearchResult


def tune(  # noqa: PLR0913 - options of a command
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
    plugins: Sequence[Any] = (),
    data: Any = None,
    factory: Factory | None = None,
) -> SearchResult:
    """Search a space with Ray Tune, one run a trial; write tables, best recipes and a report.

    Args:
        space: a shipped name, a path, or the mapping itself.
        recipe: as for `run`; supplies the values that are not drawn.
        out: folder or URI; default: a new folder under `runs/`.
        samples: number of trials, in place of the space's own; likewise the next three.
        scheduler: asha | pbt | median | none.
        search: random | optuna | grid.
        objectives: metric -> max or min.
        max_concurrent: maximum number of concurrent trials; None: as many as fit the cluster.
        resume: continue the search in `out`; finished trials are not run again.
        settings: overrides of the recipe, as for `--set`.
        address: of a running Ray cluster; default: $RAY_ADDRESS, or a new local Ray.
        watch: called with news of the search.
        plugins: own methods that may be used, as for `run`.
        data: rows in memory in place of `data.source`, as for `run`.
        factory: makes workloads and trainers in the workers; for tests.

    Raises:
        BadInputError: rejected before anything started.
        InterruptedRunError: stopped by SIGINT; continue with `resume`.
        RunError: no trial has finished.
    """
    space = load_space(
        space.model_dump() if isinstance(space, Space) else space,
        samples=samples,
        scheduler=scheduler,
        search=search,
        objectives=None if objectives is None else dict(objectives),
    )
    given = load_recipe(recipe, settings, plugins=plugins)
    if data is not None:
        given = load_recipe(given, data_settings(data))
    check_held([given])
    refuse(given, "a search")
    shared = _shared_recipe(given)
    if max_concurrent is not None and max_concurrent < 1:
        raise BadInputError(f"--max-concurrent: expected at least 1, got {max_concurrent}")
    if max_concurrent is not None and space.scheduler == "pbt":
        raise BadInputError(
            "--max-concurrent: expected none with scheduler pbt, whose trials take turns where the"
            f" cluster cannot hold all of them; got {max_concurrent}"
        )
    location = run_location(out, f"tune-{shared.name}")
    folder = RunFolder(location)
    # Trials have other working folders, so the path is absolute.
    location = location if folder.local is None else str(folder.local)
    check_objectives(space, shared)
    check_tracking(shared)
    if resume and job_id() is None:
        refuse_missing(location)
    limit = claim_search(folder, space, shared, max_concurrent, resume)
    watch = watch or (lambda news: None)
    watch(SearchNews(location=location))
    # The lease excludes a second command, which would write the same state and tables.
    with owned(folder, Ticket.of_this_process(), wait=resume, tell=say) as (folder, lease):
        claim_search(folder, space, shared, max_concurrent, resume)
        with ray_session(address):
            # Imports Ray, which reads the session's environment as it is imported.
            from rayfed_lora.tuning.search_run import run
            from rayfed_lora.tuning.trial import Search

            ignored = _ignored_settings(space, settings)
            for note in (*unused(given), *given_way_in_search(given), *ignored):
                watch(SearchNews(warning=note))
            factory = with_held(factory or TorchFactory(), [given])
            found = Search(space, shared, location, lease.ticket, factory)
            return run(found, folder, watch, limit, resume)


def _ignored_settings(space: Space, settings: Sequence[str] | Mapping[str, Any]) -> Iterator[str]:
    """Yield a note on each setting that every trial replaces by a drawn value."""
    pairs = settings if isinstance(settings, Mapping) else dict(override_pairs("--set", settings))
    for key in pairs:
        how = space.parameters.get(key)
        if how is not None and not how.when:
            yield f"{key}: the value of --set has no effect, the space draws one for each trial"


def _shared_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe that trials share: absolute paths, on Ray, in folders of their own."""
    recipe = with_absolute_paths(recipe)
    # With a checkpoint each round, a trial that ends or is copied has its newest round saved.
    storage = recipe.storage.model_copy(update={"path": None, "checkpoint_every": 1})
    runtime = recipe.runtime.model_copy(update={"executor": "ray"})
    return recipe.model_copy(update={"storage": storage, "runtime": runtime})
