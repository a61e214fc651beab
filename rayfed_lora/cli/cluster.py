"""The commands about a cluster: jobs, and what is wrong with it. No logic, as in `cli`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from rayfed_lora.cli.options import OutOption, RecipeArgument, SetOption
from rayfed_lora.printable import echo

if TYPE_CHECKING:
    from rayfed_lora.jobs.jobs import Jobs, Submitted

app = typer.Typer()

DashboardOption = Annotated[
    str | None,
    typer.Option("--address", help="The cluster's dashboard, e.g. http://127.0.0.1:8265."),
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="As submit printed it.")]
FollowOption = Annotated[
    bool, typer.Option("--follow", help="Show what the job prints until it ends.")
]


@app.command()
def submit(
    recipe: RecipeArgument,
    address: DashboardOption = None,
    set_: SetOption = None,
    out: OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    follow: FollowOption = False,
) -> None:
    """Run a recipe as a Ray job of a cluster."""
    from rayfed_lora.recipe.loading import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    from rayfed_lora.jobs.jobs import Jobs

    jobs = Jobs(address)
    _submitted(jobs, jobs.submit(loaded, out, resume=resume), follow)


@app.command()
def resume(job: JobArgument, address: DashboardOption = None, follow: FollowOption = False) -> None:
    """Go on with the run of a job that was stopped or has failed."""
    from rayfed_lora.jobs.jobs import Jobs

    jobs = Jobs(address)
    _submitted(jobs, jobs.resume(job), follow)


def _submitted(jobs: Jobs, submitted: Submitted, follow: bool) -> None:
    from rayfed_lora.cli.console import PlainConsole
    from rayfed_lora.jobs.views import show_submitted

    show_submitted(PlainConsole(), submitted.id, submitted.location, submitted.notes)
    if follow:
        raise typer.Exit(_follow(jobs, submitted.id))


def _follow(jobs: Jobs, job: str) -> int:
    from rayfed_lora.jobs.views import exit_status

    return exit_status(jobs.follow(job, _echo))


def _echo(text: str) -> None:
    echo(text, end="")


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(metavar="ID", help="One job; default all.")] = None,
    address: DashboardOption = None,
) -> None:
    """Show where jobs stand: stage, round, metrics, time left."""
    from rayfed_lora.cli.console import PlainConsole
    from rayfed_lora.jobs.jobs import Jobs
    from rayfed_lora.jobs.views import show_job, show_jobs

    jobs, console = Jobs(address), PlainConsole()
    if job is None:
        wide = console if console.is_terminal else PlainConsole(width=160)
        show_jobs(wide, jobs.all())
    else:
        show_job(console, jobs.status(job), time.time())


@app.command()
def logs(job: JobArgument, address: DashboardOption = None, follow: FollowOption = False) -> None:
    """Print what a job has printed."""
    from rayfed_lora.jobs.jobs import Jobs

    jobs = Jobs(address)
    if follow:
        raise typer.Exit(_follow(jobs, job))
    echo(jobs.logs(job), end="")


@app.command()
def stop(job: JobArgument, address: DashboardOption = None) -> None:
    """Stop a job; its finished rounds are kept."""
    from rayfed_lora.cli.console import PlainConsole
    from rayfed_lora.jobs.jobs import Jobs
    from rayfed_lora.jobs.views import show_stopped

    show_stopped(PlainConsole(), Jobs(address).stop(job))


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, or its dashboard's URL; default this machine."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="RECIPE", help="To be fitted in; repeatable; default the shipped."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or URI that every node must be able to write.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure the recipes' GPU memory by short runs.")
    ] = False,
) -> None:
    """Say what this machine or a cluster offers, what is wrong, and how to fix it."""
    from rayfed_lora.cli.console import PlainConsole
    from rayfed_lora.doctor.findings import diagnosis_status, show_diagnosis
    from rayfed_lora.jobs.dashboard import is_dashboard
    from rayfed_lora.recipe.loading import load_recipe

    recipes = [load_recipe(each) for each in recipe or ()]
    if is_dashboard(address):
        from rayfed_lora.doctor.remote import examine
        from rayfed_lora.jobs.views import JobView, exit_status

        found = examine(address, recipes, storage=storage, probe=probe, show=_echo)
        if isinstance(found, JobView):
            raise typer.Exit(exit_status(found))
    else:
        from rayfed_lora.doctor.doctor import doctor as look

        found = look(address, recipes, storage=storage, probe=probe)
    show_diagnosis(PlainConsole(), found)
    raise typer.Exit(diagnosis_status(found))
