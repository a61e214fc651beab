"""The commands. No logic; each command itself imports the heavy modules that it needs."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from rayfed_lora.cli import cluster
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.options import AddressOption, OutOption, RecipeArgument, SetOption
from rayfed_lora.cli.output import safe_output
from rayfed_lora.errors import BadInputError, RayfedError
from rayfed_lora.printable import echo

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Federated LoRA fine-tuning simulated on Ray, with annealed parameter budgets.",
)
app.add_typer(cluster.app)


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: OutOption = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out.")] = False,
    detach: Annotated[bool, Option("--detach", help="Start in a cluster, return.")] = False,
    address: AddressOption = None,
) -> None:
    """Run a recipe."""
    from rayfed_lora.recipe.loading import load_recipe

    # Before heavy imports: most mistakes are in the recipe.
    loaded = load_recipe(recipe, set_ or ())
    from rayfed_lora.cli.run_display import show_summary, watching
    from rayfed_lora.launching import launch

    if resume and out is None and loaded.storage.path is None:
        missing = "give --out, the folder of the run to continue"
        raise typer.BadParameter(missing, param_hint="--resume")
    console = PlainConsole()
    if detach:
        started = launch.start(loaded, out, resume=resume, address=address)
        console.print_line(f"started as actor '{started.actor}'; run folder: {started.location}")
        return
    with watching(console) as watch:
        result = launch.run(loaded, out, resume=resume, address=address, watch=watch)
    show_summary(console, result.summary, result.location)


@app.command()
def compare(
    recipe: RecipeArgument,
    methods: Annotated[str, Option(help="Presets, e.g. sa-fedlora,fedavg,fedlora.")],
    out: Annotated[str, Option(help="Folder or URI of the comparison.")],
    seeds: Annotated[str, Option(help="Seeds, e.g. 0,1,2.")] = "0",
    target: Annotated[
        float | None, Option(help="Accuracy to reach; default 95 % of the best.")
    ] = None,
    set_: SetOption = None,
    address: AddressOption = None,
) -> None:
    """Run a recipe under several methods and seeds; rerunning resumes."""
    from rayfed_lora.cli.many_runs_display import show_comparison, watching_comparison
    from rayfed_lora.launching.compare import compare as run_all

    console = PlainConsole()
    with watching_comparison(console) as watch:
        comparison = run_all(
            recipe,
            _list(methods),
            out,
            [_seed(seed) for seed in _list(seeds)],
            settings=set_ or (),
            target=target,
            address=address,
            watch=watch,
        )
    show_comparison(console.widened(120), comparison, out)
    if comparison.runs["error"].notna().any():
        raise typer.Exit(1)


@app.command()
def tune(  # noqa: PLR0913, PLR0917 - options
    space: Annotated[str, Argument(metavar="SPACE", help="A shipped name or a path.")],
    recipe: Annotated[str, Option(help="Values outside the space: a shipped name or a path.")],
    samples: Annotated[int | None, Option(help="Number of trials.")] = None,
    scheduler: Annotated[
        str | None, Option(help="Stops trials early: asha, pbt, median or none.")
    ] = None,
    search: Annotated[str | None, Option(help="Chooses values: random, optuna or grid.")] = None,
    objectives: Annotated[
        str | None, Option(help="E.g. eval_accuracy:max,total_bytes:min.")
    ] = None,
    max_concurrent: Annotated[int | None, Option(help="Maximum concurrent trials.")] = None,
    out: OutOption = None,
    resume: Annotated[bool, Option("--resume", help="Continue the search in --out.")] = False,
    set_: SetOption = None,
    address: AddressOption = None,
) -> None:
    """Search a space of recipes with Ray Tune, one run a trial.

    An option overrides the same key of the space.
    """
    from rayfed_lora.cli.many_runs_display import show_search, watching_search
    from rayfed_lora.tuning.tune import tune as search_all

    if resume and out is None:
        raise typer.BadParameter("give --out, the folder of the search", param_hint="--resume")
    console = PlainConsole()
    with watching_search(console) as watch:
        found = search_all(
            space,
            recipe,
            out,
            samples=samples,
            scheduler=scheduler,
            search=search,
            objectives=None if objectives is None else _objectives(objectives),
            max_concurrent=max_concurrent,
            resume=resume,
            settings=set_ or (),
            address=address,
            watch=watch,
        )
    show_search(console, found.trials, found.best, found.location)


def _objectives(text: str) -> dict[str, str]:
    found = {}
    for item in _list(text):
        name, colon, mode = item.partition(":")
        if not colon:
            expected = f"expected metric:max or metric:min, got {item!r}"
            raise typer.BadParameter(expected, param_hint="--objectives")
        found[name] = mode
    return found


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise typer.BadParameter(f"expected whole numbers, got {text!r}", param_hint="--seeds")
    return int(text)


@app.command()
def plan(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Print the schedule with ranks, traffic and resources, without running it."""
    from rayfed_lora.recipe.loading import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    from rayfed_lora.cli.plan_table import show_plan
    from rayfed_lora.launching import planning

    show_plan(PlainConsole().widened(110), loaded, planning.plan(loaded))


@app.command()
def report(
    folders: Annotated[
        list[str],
        Argument(metavar="DIR...", help="Folders of runs or comparisons, or of one search."),
    ],
    out: Annotated[
        str | None,
        Option(help="Output file; default report.html in DIR, or here for several folders."),
    ] = None,
) -> None:
    """Write one HTML file with interactive plots and tables of runs."""
    from rayfed_lora.pages.report import report as write_report

    echo(f"report: {write_report(folders, out)}")


@app.command()
def export(
    folder: Annotated[str, Argument(metavar="DIR", help="A finished run's folder.")],
    to: Annotated[Path, Option(help="A new or empty folder.")],
    merge: Annotated[bool, Option("--merge", help="One model instead of an adapter.")] = False,
) -> None:
    """Write the trained PEFT adapter, or the merged model."""
    from rayfed_lora.launching.exporting import export_run

    for line in export_run(folder, to, merge=merge):
        echo(line)


@app.command()
def recipes(
    name: Annotated[str | None, Argument(help="Print this recipe.")] = None,
    schema: Annotated[bool, Option("--schema", help="Print the JSON Schema.")] = False,
) -> None:
    """List the shipped recipes, or print one."""
    from rayfed_lora.recipe.loading import recipe_schema, shipped_names, shipped_text

    if schema:
        typer.echo(json.dumps(recipe_schema(), indent=1))
    elif name is not None:
        typer.echo(shipped_text(name), nl=False)
    else:
        for shipped in shipped_names():
            first_line = shipped_text(shipped).splitlines()[0]
            typer.echo(f"{shipped:<20} {first_line.lstrip('# ')}")


def _repeated(arguments: list[str]) -> list[str]:
    """Repeat `--set` before each further key=value, so that one `--set` takes several."""
    result: list[str] = []
    setting = False
    for argument in arguments:
        if argument.startswith("-"):
            setting = argument == "--set"
        elif setting and result[-1] != "--set":
            setting = "=" in argument
            result += ["--set"] * setting
        result.append(argument)
    return result


def _check_working_folder() -> None:
    """Raise BadInputError where the working folder is gone: libraries end the process for it."""
    try:
        Path.cwd()
    except OSError as error:
        where = "the working folder was deleted or cannot be read"
        raise BadInputError(f"{where} ({error.strerror}): change to another one") from error


def main() -> None:
    """Run the command line; an error becomes one message and an exit status."""
    with safe_output():
        try:
            _check_working_folder()
            app(_repeated(sys.argv[1:]))
        except RayfedError as error:
            echo(f"rayfed-lora: {error}", file=sys.stderr)
            sys.exit(error.exit_status)
        except KeyboardInterrupt:
            print("rayfed-lora: ended at once; resume with --resume --out", file=sys.stderr)
            sys.exit(130)
        except Exception:  # a bug; its text may still come from a stranger's file
            echo(traceback.format_exc(), end="", file=sys.stderr)
            sys.exit(1)
