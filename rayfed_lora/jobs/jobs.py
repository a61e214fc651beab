"""Runs as Ray jobs: submit, follow, stop and resume them through a cluster's dashboard.

A recipe travels as a file; the job's shell command is fixed text. Source: this project.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rayfed_lora.endpoints import OWN_ENDPOINTS, named_in
from rayfed_lora.errors import (
    BadInputError,
    InterruptedRunError,
    RayfedError,
    RecipeError,
    RunError,
)
from rayfed_lora.jobs.dashboard import client_of, translated_errors
from rayfed_lora.jobs.local_files import modules_of, refuse_memory, travel_notes
from rayfed_lora.jobs.views import JobView, run_metadata, runs_recipe
from rayfed_lora.plugins.modules import flags
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs.location import JOB_RUNS, refuse_relative, with_absolute_paths
from rayfed_lora.storage import refuse_secrets

RECIPE_FILE = "recipe.yaml"
COMMAND = f"rayfed-lora run {RECIPE_FILE}"
# How long Ray lets a stopped job save its run before it kills the job; Ray's default is 3 s.
STOP_WAIT_S = 120
_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
_POLL_S = 0.5
_NAME_LENGTH = 40


@dataclass(frozen=True)
class Submitted:
    """A submitted job.

    Attributes:
        id: Ray's submission id.
        location: run folder, as the cluster's nodes see it.
        notes: warnings for the user, one line each.
    """

    id: str
    location: str
    notes: tuple[str, ...] = ()


class Jobs:
    """The jobs of one cluster that run recipes.

    Methods with the id of a job raise BadInputError where the cluster has no such job.
    """

    def __init__(self, address: str | None = None, client: Any = None) -> None:
        """Connect.

        Args:
            address: of the dashboard, e.g. http://127.0.0.1:8265; default
                $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS.
            client: replaces Ray's JobSubmissionClient, for tests.

        Raises:
            ResourceError: nothing answers there, or the dashboard rejects the token.
        """
        self._client = client or client_of(address)

    def submit(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        out: str | None = None,
        *,
        settings: Sequence[str] | Mapping[str, Any] = (),
        resume: bool = False,
        plugins: Sequence[Any] = (),
    ) -> Submitted:
        """Submit a run to the cluster and return at once.

        Args:
            recipe: as for `run`.
            out: run folder as the cluster's nodes see it, or URI; default `storage.path`, or a new
                folder under `JOB_RUNS` on the head node.
            settings: overrides of the recipe, as for `--set`.
            resume: continue the run in `out`.
            plugins: modules of own methods; those of your folders are sent along, installed
                packages are needed on every node.

        Raises:
            BadInputError: rejected; nothing was started.
        """
        loaded = load_recipe(recipe, settings, plugins=plugins)
        refuse_memory(loaded)
        job = _new_id(loaded.name)
        location = out or loaded.storage.path
        if resume and location is None:
            raise BadInputError("--resume: give --out, the folder of the run to continue")
        where = location or f"{JOB_RUNS}/{job}"
        refuse_relative(where)
        refuse_secrets(where)
        notes = (*travel_notes(loaded, where, given=location is not None), *unused(loaded))
        storage = loaded.storage.model_copy(update={"path": where})
        loaded = with_absolute_paths(loaded).model_copy(update={"storage": storage})
        self._start(
            job,
            " ".join([COMMAND, *["--resume"] * resume, *flags(loaded.plugins)]),
            {RECIPE_FILE: recipe_yaml(loaded), **modules_of(loaded)},
            # A job does not trust the endpoints in its recipe file: their names travel beside it.
            named_in(loaded.model_dump()),
            run_metadata(loaded, where),
        )
        return Submitted(job, where, notes)

    def start(
        self, name: str, command: str, files: Mapping[str, str], endpoints: Collection[str] = ()
    ) -> str:
        """Start a job that is not a run, with `name` as prefix of its id; return its id.

        The shell command `command`, quoted, finds `files` (texts by name) in its working folder;
        it may send credentials to `endpoints`, object stores that the user has named.
        """
        return self._start(_new_id(name), command, files, endpoints, {})

    def _start(
        self,
        job: str,
        command: str,
        files: Mapping[str, str | Path],
        endpoints: Collection[str],
        metadata: Mapping[str, str],
    ) -> str:
        environment = dict(_ENVIRONMENT)
        if endpoints:
            environment[OWN_ENDPOINTS] = ",".join(sorted(endpoints))
        with tempfile.TemporaryDirectory() as folder, translated_errors():
            for name, content in files.items():
                _place(content, Path(folder, name))
            self._client.submit_job(
                entrypoint=command,
                submission_id=job,
                runtime_env={"working_dir": folder, "env_vars": environment},
                metadata=dict(metadata),
            )
        return job

    def all(self) -> list[JobView]:
        """Return the jobs that run recipes, including those of plain `ray job submit`."""
        with translated_errors():
            found = self._client.list_jobs()
        return [JobView.of(job) for job in found if runs_recipe(job)]

    def _ids(self) -> list[str]:
        with suppress(RayfedError):
            return [view.id for view in self.all()]
        return []

    def status(self, job: str) -> JobView:
        """Return the state and progress of a job."""
        with translated_errors(job, self._ids):
            return JobView.of(self._client.get_job_info(job))

    def logs(self, job: str) -> str:
        """Return the whole output of a job."""
        with translated_errors(job, self._ids):
            return str(self._client.get_job_logs(job))

    def follow(self, job: str, show: Callable[[str], None]) -> JobView:
        """Show the output of a job until it ends; return how the job ended.

        Raises:
            InterruptedRunError: SIGINT; the job continues.
        """
        view = self.status(job)
        shown = 0

        async def tail() -> None:
            nonlocal shown
            seen = 0
            async for text in self._client.tail_job_logs(job):
                # After a broken connection the log comes from its start again.
                fresh = text[max(shown - seen, 0) :]
                seen += len(text)
                if fresh:
                    shown += len(fresh)
                    show(fresh)

        from aiohttp import ClientError

        try:
            while True:
                with suppress(RuntimeError, ClientError):
                    asyncio.run(tail())
                view = self.status(job)
                if view.ended:
                    return view
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"no longer following; job {job} continues: rayfed-lora stop {job} ends it"
            ) from None

    def stop(self, job: str) -> JobView:
        """Stop a job, whose run saves its finished rounds, and wait for its end.

        Raises:
            BadInputError: the job has ended.
            RunError: the job has not ended in time.
        """
        view = self.status(job)
        if view.ended:
            raise BadInputError(f"job {job} has ended already ({view.state}); nothing was stopped")
        with translated_errors(job, self._ids):
            self._client.stop_job(job)
        deadline = time.monotonic() + STOP_WAIT_S + 10
        while not view.ended:
            if time.monotonic() > deadline:
                raise RunError(f"job {job} has not ended {STOP_WAIT_S + 10} s after its stop")
            time.sleep(_POLL_S)
            view = self.status(job)
        return view

    def resume(self, job: str, *, plugins: Sequence[Any] = ()) -> Submitted:
        """Continue the run of a stopped or failed job, as a new job.

        Args:
            job: its id.
            plugins: modules of own methods that its recipe may name, as for `submit`.

        Raises:
            BadInputError: it still runs, its run has finished, or its record lacks the recipe.
        """
        view = self.status(job)
        if not view.ended:
            raise BadInputError(f"job {job} is still {view.state}: nothing to resume")
        if view.run_finished:
            raise BadInputError(f"job {job} has finished; its run folder: {view.location}")
        if view.recipe_yaml is None or view.location is None:
            raise BadInputError(
                f"job {job} ended before it reported its recipe; submit it again by"
                " rayfed-lora submit RECIPE --out DIR --resume"
            )
        try:
            reported = parse_yaml(job, view.recipe_yaml)
            # The user named these endpoints when the job was submitted.
            recipe = load_recipe(reported, endpoints=named_in(reported), plugins=plugins)
        except (RecipeError, TypeError, AttributeError) as error:
            raise BadInputError(f"the recipe of job {job} cannot be read: {error}") from None
        return self.submit(recipe, view.location, resume=True)


def _place(content: str | Path, target: Path) -> None:
    """Write a text, or copy a module's file or a package's folder."""
    if isinstance(content, str):
        target.write_text(content, "utf-8")
    elif content.is_dir():
        shutil.copytree(content, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy(content, target.with_name(content.name))


def _new_id(name: str) -> str:
    return f"{name[:_NAME_LENGTH]}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:6]}"
