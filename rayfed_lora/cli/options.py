"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name or a path.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a recipe key; repeatable."),
]
OutOption = Annotated[str | None, typer.Option(help="Run folder or URI.")]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster.")]
