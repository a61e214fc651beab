"""The commands for a cluster: jobs and diagnosis. No logic."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.options import (
    OutOption,
    PluginsOption,
    RecipeArgument,
    SetOption,
    examples,
)
from rayfed_lora.printable import echo

if TYPE_CHECKING:
    from rayfed_lora.jobs.jobs import Jobs, Submitted

app = typer.Typer()

DashboardOption = Annotated[
    str | None, Option("--address", help="The cluster's dashboard, e.g. http://127.0.0.1:8265.")
]
JobArgument = Annotated[str, Argument(metavar="ID", help="As printed by submit.")]
FollowOption = Annotated[bool, Option("--follow", help="Show the job's output until it ends.")]


@app.command(
    epilog=examples(
        "submit digits-vit --address http://127.0.0.1:8265",
        "submit my.yaml --out s3://bucket/runs/a --follow",
    )
)
def submit(
    recipe: RecipeArgument,
    address: DashboardOption = None,
    set_: SetOption = None,
    out: OutOption = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
    follow: FollowOption = False,
    plugins: PluginsOption = None,
) -> None:
    """Run a recipe as a Ray job of a cluster."""
    from rayfed_lora.recipe.loading import load_recipe

    loaded = load_recipe(recipe, set_ or (), plugins=plugins or ())
    jobs = _jobs(address)
    _submitted(jobs, jobs.submit(loaded, out, resume=resume), follow, address)


@app.command(epilog=examples("resume digits-vit-20260101-120000-abc123"))
def resume(
    job: JobArgument,
    address: DashboardOption = None,
    follow: FollowOption = False,
    plugins: PluginsOption = None,
) -> None:
    """Continue the run of a stopped or failed job."""
    jobs = _jobs(address)
    _submitted(jobs, jobs.resume(job, plugins=plugins or ()), follow, address)


def _jobs(address: str | None) -> Jobs:
    from rayfed_lora.jobs.jobs import Jobs

    return Jobs(address)


def _submitted(jobs: Jobs, submitted: Submitted, follow: bool, address: str | None) -> None:
    from rayfed_lora.cli.cluster_display import show_submitted

    show_submitted(PlainConsole(), submitted, address, follow)
    if follow:
        raise typer.Exit(_follow(jobs, submitted.id))


def _follow(jobs: Jobs, job: str) -> int:
    from rayfed_lora.jobs.views import exit_status

    return exit_status(jobs.follow(job, partial(echo, end="")))


@app.command(epilog=examples("status", "status digits-vit-20260101-120000-abc123"))
def status(
    job: Annotated[str | None, Argument(metavar="ID", help="One job; default all.")] = None,
    address: DashboardOption = None,
) -> None:
    """Show the progress of jobs: stage, round, metrics, time left."""
    from rayfed_lora.cli.cluster_display import show_job, show_jobs

    jobs, console = _jobs(address), PlainConsole()
    if job is None:
        show_jobs(console, jobs.all(), address)
    else:
        show_job(console, jobs.status(job), time.time(), address)


@app.command(epilog=examples("logs digits-vit-20260101-120000-abc123 --follow"))
def logs(job: JobArgument, address: DashboardOption = None, follow: FollowOption = False) -> None:
    """Print the output of a job."""
    jobs = _jobs(address)
    if follow:
        raise typer.Exit(_follow(jobs, job))
    echo(jobs.logs(job), end="")


@app.command(epilog=examples("stop digits-vit-20260101-120000-abc123"))
def stop(job: JobArgument, address: DashboardOption = None) -> None:
    """Stop a job; its finished rounds are kept."""
    from rayfed_lora.cli.cluster_display import show_stopped

    show_stopped(PlainConsole(), _jobs(address).stop(job), address)


@app.command(
    epilog=examples(
        "doctor", "doctor --recipe my.yaml --probe", "doctor --address http://127.0.0.1:8265"
    )
)
def doctor(
    address: Annotated[
        str | None,
        Option(help="A running Ray cluster, or its dashboard's URL; default this machine."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        Option(metavar="RECIPE", help="Recipe to check; repeatable; default the shipped ones."),
    ] = None,
    storage: Annotated[
        str | None, Option(help="Folder or URI that all nodes must write to.")
    ] = None,
    probe: Annotated[bool, Option("--probe", help="Measure GPU memory by short runs.")] = False,
) -> None:
    """Check this machine or a cluster, and print what is wrong and how to fix it."""
    from rayfed_lora.cli.cluster_display import show_diagnosis
    from rayfed_lora.diagnosis.findings import diagnosis_status
    from rayfed_lora.jobs.dashboard import is_dashboard
    from rayfed_lora.recipe.loading import load_recipe

    recipes = [load_recipe(each) for each in recipe or ()]
    if is_dashboard(address):
        from rayfed_lora.diagnosis.doctor import examine
        from rayfed_lora.jobs.views import JobView, exit_status

        found = examine(address, recipes, storage=storage, probe=probe, show=partial(echo, end=""))
        if isinstance(found, JobView):
            raise typer.Exit(exit_status(found))
    else:
        from rayfed_lora.diagnosis.doctor import doctor as diagnose

        found = diagnose(address, recipes, storage=storage, probe=probe)
    show_diagnosis(PlainConsole(), found)
    raise typer.Exit(diagnosis_status(found))
