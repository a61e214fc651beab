"""The commands. No logic; each command itself imports the heavy modules that it needs."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from rayfed_lora import __version__
from rayfed_lora.cli import cluster, methods
from rayfed_lora.cli.completion import complete_methods, complete_spaces, paths
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.next_steps import command, resumable, resume_command, same_command
from rayfed_lora.cli.options import (
    AddressOption,
    OutOption,
    PluginsOption,
    RecipeArgument,
    RecipeOption,
    RunArgument,
    SetOption,
    examples,
)
from rayfed_lora.cli.output import safe_output
from rayfed_lora.errors import BadInputError, RayfedError
from rayfed_lora.plugins.modules import flags
from rayfed_lora.printable import echo

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated LoRA fine-tuning simulated on Ray, with annealed parameter budgets.",
)
app.add_typer(cluster.app)
app.add_typer(methods.app)


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"rayfed-lora {__version__}")
        raise typer.Exit


@app.callback(epilog=examples("run digits-vit", "recipes"))
def _options(
    version: Annotated[
        bool,
        Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "run digits-vit --out runs/a",
        "run my.yaml --set seed=1 clients.per_round=8",
        "run runs/a --resume",
    )
)
def run(  # noqa: PLR0913, PLR0917 - options
    recipe: RunArgument,
    set_: SetOption = None,
    out: OutOption = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue the run in the folder RECIPE or --out.")
    ] = False,
    detach: Annotated[bool, Option("--detach", help="Start in a cluster, return.")] = False,
    address: AddressOption = None,
    plugins: PluginsOption = None,
    accept_changed_plugins: Annotated[
        bool,
        Option("--accept-changed-plugins", help="Continue with changed code of own methods."),
    ] = False,
) -> None:
    """Run a recipe, or continue a run."""
    from rayfed_lora.runs.resuming import recipe_and_place

    # Before heavy imports: most mistakes are in the recipe.
    loaded, location = recipe_and_place(recipe, out, resume, set_ or (), plugins or ())
    from rayfed_lora.cli.run_display import show_summary, watching

    console = PlainConsole()
    if detach:
        from rayfed_lora.launching import launch

        started = launch.start(loaded, location, resume=resume, address=address)
        facts = {"actor": started.actor, "run folder": started.location}
        console.print_facts(facts | {"at its end": command("report", started.location)})
        return
    with (
        resumable(lambda: resume_command(location, address, loaded.plugins)),
        watching(console, location) as watch,
    ):
        from rayfed_lora.launching import launch

        result = launch.run(
            loaded,
            location,
            resume=resume,
            address=address,
            watch=watch,
            accept_changed_plugins=accept_changed_plugins,
        )
    show_summary(console, result.summary, result.location, result.harness)


@app.command(
    epilog=examples(
        "compare digits-vit --methods sa-fedlora,fedavg --out runs/b",
        "compare my.yaml --methods fedlora,flora --seeds 0,1,2 --out runs/c",
    )
)
def compare(  # noqa: PLR0913, PLR0917 - options
    recipe: RecipeArgument,
    methods: Annotated[
        str,
        Option(
            help="Presets, separated by commas: sa-fedlora, fedavg, fedprox, fedlora, flexlora,"
            " flora, fedex-lora, ffa-lora, rolora, hetlora, fedsa-lora, lora-fair, spd-cfl,"
            " head-only, bitfit, scaffold, feddyn, local-only.",
            autocompletion=complete_methods,
        ),
    ],
    out: Annotated[str, Option(help="Folder or URI of the comparison.", autocompletion=paths)],
    seeds: Annotated[str, Option(help="Seeds, e.g. 0,1,2.")] = "0",
    target: Annotated[
        float | None, Option(help="Test accuracy to reach; default 95 % of the best.")
    ] = None,
    set_: SetOption = None,
    address: AddressOption = None,
    plugins: PluginsOption = None,
) -> None:
    """Run a recipe under several methods and seeds; rerunning resumes."""
    from rayfed_lora.cli.many_runs_display import show_comparison, watching_comparison

    console = PlainConsole()
    with resumable(same_command), watching_comparison(console, out) as watch:
        from rayfed_lora.launching.compare import compare as run_all

        comparison = run_all(
            recipe,
            _list(methods),
            out,
            [_seed(seed) for seed in _list(seeds)],
            settings=set_ or (),
            target=target,
            address=address,
            watch=watch,
            plugins=plugins or (),
        )
    show_comparison(console, comparison, out)
    if comparison.runs["error"].notna().any():
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "tune heating_cooling --recipe digits-vit --samples 8 --out runs/t",
        "tune quick --recipe my.yaml --objectives train_loss:min",
        "run runs/t/best.yaml",
    )
)
def tune(  # noqa: PLR0913, PLR0917 - options
    space: Annotated[
        str,
        Argument(
            metavar="SPACE",
            help="A path, or a shipped name: allocation_and_rule, heating_cooling, learning_rate,"
            " quick.",
            autocompletion=complete_spaces,
        ),
    ],
    recipe: RecipeOption,
    samples: Annotated[int | None, Option(help="Number of trials.")] = None,
    scheduler: Annotated[
        str | None, Option(help="Stops trials early: asha, pbt, median or none.")
    ] = None,
    search: Annotated[str | None, Option(help="Chooses values: random, optuna or grid.")] = None,
    objectives: Annotated[
        str | None,
        Option(
            help="METRIC:max or METRIC:min, separated by commas; metrics: eval_accuracy, eval_loss,"
            " eval_macro_f1, eval_auc, eval_perplexity, train_loss, total_bytes, bytes_up,"
            " bytes_down, bytes_base, seconds."
        ),
    ] = None,
    max_concurrent: Annotated[int | None, Option(help="Maximum concurrent trials.")] = None,
    out: OutOption = None,
    resume: Annotated[bool, Option("--resume", help="Continue the search in --out.")] = False,
    set_: SetOption = None,
    address: AddressOption = None,
    plugins: PluginsOption = None,
) -> None:
    """Search a space of recipes with Ray Tune, one run a trial.

    An option overrides the same key of the space.
    """
    from rayfed_lora.cli.many_runs_display import show_search, watching_search

    if resume and out is None:
        raise typer.BadParameter("give --out, the folder of the search", param_hint="--resume")
    console, places = PlainConsole(), list[str]()
    with (
        resumable(lambda: same_command("--resume", out=places[0] if places else None)),
        watching_search(console, places) as watch,
    ):
        from rayfed_lora.tuning.space import load_space
        from rayfed_lora.tuning.tune import tune as search_all

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
            plugins=plugins or (),
        )
    show_search(console, found, list(load_space(space).drawn), plugins or ())


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


@app.command(epilog=examples("plan digits-vit", "plan my.yaml --set annealing.heating.rank=32"))
def plan(recipe: RecipeArgument, set_: SetOption = None, plugins: PluginsOption = None) -> None:
    """Print the schedule with ranks, traffic and resources, without running it."""
    from rayfed_lora.recipe.loading import load_recipe

    loaded = load_recipe(recipe, set_ or (), plugins=plugins or ())
    from rayfed_lora.cli.plan_table import show_plan, show_stages

    console = PlainConsole()
    # Before torch is imported and data are read, which take seconds.
    show_stages(console, loaded)
    from rayfed_lora.launching import planning

    show_plan(console, loaded, planning.plan(loaded))
    settings = [word for text in set_ or () for word in ("--set", text)]
    settings += flags(plugins or ())
    console.print_facts({"to run it": command("run", recipe, *settings)})


@app.command(epilog=examples("report runs/a", "report runs/a runs/b --out both.html"))
def report(
    folders: Annotated[
        list[str],
        Argument(
            metavar="DIR...",
            help="Folders of runs or comparisons, or of one search.",
            autocompletion=paths,
        ),
    ],
    out: Annotated[
        str | None,
        Option(help="Output file; default report.html in DIR, or here for several folders."),
    ] = None,
) -> None:
    """Write one HTML file with interactive plots and tables of runs."""
    from rayfed_lora.pages.report import report as write_report

    echo(f"report: {write_report(folders, out)}")


@app.command(epilog=examples("export runs/a --to adapter", "export runs/a --to model --merge"))
def export(
    folder: Annotated[
        str, Argument(metavar="DIR", help="A finished run's folder.", autocompletion=paths)
    ],
    to: Annotated[Path, Option(help="A new or empty folder.")],
    merge: Annotated[bool, Option("--merge", help="One model instead of an adapter.")] = False,
) -> None:
    """Write the trained PEFT adapter, or the merged model."""
    from rayfed_lora.launching.exporting import export_run

    for line in export_run(folder, to, merge=merge):
        echo(line)


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
            echo("rayfed-lora: ended at once", file=sys.stderr)
            sys.exit(130)
        except Exception:  # a bug; its text may still come from a stranger's file
            echo(traceback.format_exc(), end="", file=sys.stderr)
            sys.exit(1)
