"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="A shipped name or a path.")]
SetOption = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY.PATH=VALUE", help="Override a recipe key; repeatable."),
]
OutOption = Annotated[str | None, Option(help="Run folder or URI.")]
AddressOption = Annotated[str | None, Option(help="A running Ray cluster.")]
