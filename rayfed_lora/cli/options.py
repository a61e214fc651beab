"""Arguments and options that several commands have. Source: this project."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from rayfed_lora.cli.completion import complete_recipes, paths


def examples(*lines: str) -> str:
    """Return the last part of a command's help: command lines that use it."""
    return "\n\n".join(["Examples:", *(f"rayfed-lora {line}" for line in lines)])


RECIPE_HELP = "A shipped name (`rayfed-lora recipes` lists them) or a path."
RecipeArgument = Annotated[
    str, Argument(metavar="RECIPE", help=RECIPE_HELP, autocompletion=complete_recipes)
]
RunArgument = Annotated[
    str,
    Argument(
        metavar="RECIPE",
        help=f"{RECIPE_HELP} With --resume the folder or URI of a run, too.",
        autocompletion=complete_recipes,
    ),
]
RecipeOption = Annotated[
    str,
    Option(
        "--recipe", help=f"Values outside the space. {RECIPE_HELP}", autocompletion=complete_recipes
    ),
]
SetOption = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY.PATH=VALUE", help="Override a recipe key; repeatable."),
]
PluginsOption = Annotated[
    list[str] | None,
    Option(
        "--plugins",
        metavar="MODULE",
        help="Allow a Python module with own methods, here or installed; repeatable.",
    ),
]
OutOption = Annotated[str | None, Option(help="Run folder or URI.", autocompletion=paths)]
AddressOption = Annotated[str | None, Option(help="A running Ray cluster.")]
