"""The list of methods on the terminal. Source: this project."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.plugins import tables  # noqa: F401 - makes the tables
from rayfed_lora.plugins.registry import KEYS, TABLES, Method


def show_methods(console: PlainConsole) -> None:
    """Print the methods of each kind with their options and where they come from."""
    for kind, table in TABLES.items():
        console.print_line(f"{kind} ({KEYS.get(kind, kind)})")
        console.print_rows([_row(method) for method in table.methods()], prose="options, summary")


def _row(method: Method[Any]) -> dict[str, str]:
    where = "built in" if method.built_in else method.module
    options = ", ".join(_options(method.options))
    summary = getattr(method.value, "summary", method.summary)
    return {
        "name": method.name,
        "from": where,
        "options, summary": f"{options}; {summary}" if options else summary,
    }


def _options(model: type[BaseModel]) -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        default = "" if field.default is PydanticUndefined else f"={field.default}"
        found.append(f"{name}{default}")
    return found
