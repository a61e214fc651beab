"""The commands that show recipes and methods, check own methods and test models. No logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from rayfed_lora.cli.completion import complete_recipes, paths
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.options import PluginsOption, examples

app = typer.Typer()


@app.command(epilog=examples("recipes", "recipes digits-vit > my.yaml", "recipes --schema"))
def recipes(
    name: Annotated[
        str | None, Argument(help="Print this recipe.", autocompletion=complete_recipes)
    ] = None,
    schema: Annotated[bool, Option("--schema", help="Print the JSON Schema.")] = False,
) -> None:
    """List the shipped recipes, or print one."""
    from rayfed_lora.recipe.loading import recipe_schema, shipped_names, shipped_text

    if schema:
        typer.echo(json.dumps(recipe_schema(), indent=1))
    elif name is not None:
        typer.echo(shipped_text(name), nl=False)
    else:
        console = PlainConsole()
        for shipped in shipped_names():
            first_line = shipped_text(shipped).splitlines()[0]
            console.print_line(f"{shipped:<20} {first_line.lstrip('# ')}")


@app.command(epilog=examples("plugins", "plugins --plugins my_methods"))
def plugins(plugins: PluginsOption = None) -> None:
    """List the methods to choose from, by kind, with their options and where they come from."""
    from rayfed_lora.cli.plugins_display import show_methods
    from rayfed_lora.plugins.modules import permit

    permit(plugins or ())
    show_methods(PlainConsole())


@app.command("check-plugin", epilog=examples("check-plugin my_methods"))
def check_plugin(
    module: Annotated[str, Argument(metavar="MODULE", help="A Python module with own methods.")],
) -> None:
    """Check that own methods give the same result however a run is divided, stopped and resumed."""
    from rayfed_lora.launching.check_plugin import check_plugin as check

    found = check(module)
    console = PlainConsole()
    for each in found:
        console.print_line(f"{each.method.kind} {each.method.name}")
        for way, outcome in each.outcomes.items():
            console.print_line(f"  {way}: {outcome}")
    if not all(each.passed for each in found):
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "evaluate runs/a --tasks hellaswag", "evaluate runs/a --tasks my_task --include tasks"
    )
)
def evaluate(
    folder: Annotated[
        str, Argument(metavar="DIR", help="A finished run's folder.", autocompletion=paths)
    ],
    tasks: Annotated[str, Option(help="Tasks of lm-evaluation-harness, separated by commas.")],
    include: Annotated[Path | None, Option(help="A folder with tasks of your own (YAML).")] = None,
    limit: Annotated[int | None, Option(min=1, help="Most examples of a task.")] = None,
    few_shot: Annotated[int | None, Option(min=0, help="Examples in the prompt.")] = None,
    chat_template: Annotated[
        bool, Option("--chat-template", help="Ask prompts as a user's turns.")
    ] = False,
    batch_size: Annotated[int, Option(min=1, help="Examples in a forward pass.")] = 8,
) -> None:
    """Test a trained language model on tasks of lm-evaluation-harness."""
    from rayfed_lora.cli.run_display import harness_rows
    from rayfed_lora.launching.harness import evaluate_run

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = evaluate_run(
        folder,
        names,
        include=include,
        limit=limit,
        few_shot=few_shot,
        chat_template=chat_template,
        batch_size=batch_size,
    )
    PlainConsole().print_rows(harness_rows(found))
