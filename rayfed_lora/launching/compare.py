"""Runs a recipe under several methods and seeds. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed_lora.engines.factory import Factory, TorchFactory
from rayfed_lora.errors import RunFolderError
from rayfed_lora.launching import harness
from rayfed_lora.launching.cells import Methods, cells_of
from rayfed_lora.launching.comparison_server import ComparisonServer, run_name
from rayfed_lora.launching.in_memory import check_held, data_settings, with_held
from rayfed_lora.launching.ray_session import ray_session
from rayfed_lora.launching.this_process import absolute, interruptible, refuse_address
from rayfed_lora.pages.comparison_tables import Cell, Comparison, Ended, Standing
from rayfed_lora.pages.search_page import SEARCH_FILE
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.claiming import claim, complete, say
from rayfed_lora.runs.location import run_location
from rayfed_lora.runs.ownership import Ticket, owned
from rayfed_lora.storage import RunFolder


def compare(  # noqa: PLR0913 - the user-facing API
    recipe: Recipe | str | Path | Mapping[str, Any],
    methods: Methods,
    out: str,
    seeds: Sequence[int] = (0,),
    *,
    settings: Sequence[str] | Mapping[str, Any] = (),
    target: float | None = None,
    address: str | None = None,
    watch: Callable[[Standing], None] | None = None,
    plugins: Sequence[Any] = (),
    data: Any = None,
    factory: Factory | None = None,
) -> Comparison:
    """Run a recipe under several methods and seeds; write tables and plots of all into `out`.

    Each run has its own folder, `out/<method>/seed-<seed>`. A second call with the same `out`
    resumes: finished runs are not run again.

    Args:
        recipe: as for `run`.
        methods: names of presets, each of which overrides the recipe's own keys; or overrides by a
            name of your own, e.g. {"low": {"method": "fedlora", "annealing.heating.rank": 2}}.
        out: folder or URI of the comparison.
        seeds: of the runs.
        settings: further overrides of the recipe, as for `--set`; keys that define a method keep
            the value of its preset.
        target: accuracy to reach, for rounds and bytes to it; None: 95 % of the best one.
        address: of a running Ray cluster; default $RAY_ADDRESS, or an own Ray.
        watch: called with the standing from time to time.
        plugins: own methods that may be used, as for `run`.
        data: rows in memory in place of `data.source`, as for `run`.
        factory: builds workloads and trainers in the workers; for tests.

    Raises:
        BadInputError: rejected before anything started.
        InterruptedRunError: stopped by a signal; call again to resume.
    """
    folder = RunFolder(run_location(out, ""))
    if data is not None:
        recipe = load_recipe(recipe, data_settings(data), plugins=plugins)
    cells = cells_of(recipe, methods, seeds, absolute(folder), settings, plugins)
    check_held(cell.recipe for cell in cells)
    for name, kind in (("recipe.yaml", "a run"), (SEARCH_FILE, "a search")):
        if folder.exists(name):
            found = f"expected a folder for a comparison, it holds {kind}"
            raise RunFolderError(f"{folder.location}: {found}")
    for cell in cells:
        claim(RunFolder(cell.location), cell.recipe, resume=True)
    harness.check_recipes(
        cell.recipe for cell in cells if not harness.has_results(RunFolder(cell.location))
    )
    factory, watch = factory or TorchFactory(), watch or (lambda standing: None)
    unfinished: list[Cell] = []
    failed: dict[str, str] = {}
    # One command at a time: two would write the same tables.
    with owned(folder, Ticket.of_this_process(), wait=True, tell=say) as (folder, lease):
        for cell in cells:
            try:
                if complete(RunFolder(cell.location), cell.recipe) is None:
                    unfinished.append(cell)
            except RunFolderError as error:
                fix = f"(here: delete {cell.location} and compare again)"
                say(f"{run_name(cell)} is left out: {error} {fix}")
                failed[cell.location] = str(error)
        if unfinished:
            for ended in _run_cells(unfinished, factory, watch, address, lease.ticket):
                if ended.error is not None:
                    failed[ended.cell.location] = ended.error
        comparison = Comparison.of(cells, failed, target)
        comparison.write(folder)
        for cell in cells:
            if cell.location not in failed:
                harness.test(cell.recipe, cell.location)
        return comparison


def _run_cells(
    cells: Sequence[Cell],
    factory: Factory,
    watch: Callable[[Standing], None],
    address: str | None,
    ticket: Ticket,
) -> tuple[Ended, ...]:
    recipe = cells[0].recipe
    refuse_address(recipe, address)
    if recipe.runtime.executor == "local":
        local = ComparisonServer(cells, factory, ticket)
        with interruptible(local.stop):
            return local.run(watch)
    with ray_session(address):
        # After `ray_session`: Ray reads its settings at import.
        import ray

        from rayfed_lora.launching.drivers import driver_class, follow

        factory = with_held(factory, [cell.recipe for cell in cells])
        server = driver_class(ComparisonServer).remote(cells, factory, ticket)
        ended: tuple[Ended, ...] = follow(
            server,
            lambda: watch(ray.get(server.standing.remote())),
            "rerun the same command to resume",
        )
        return ended
