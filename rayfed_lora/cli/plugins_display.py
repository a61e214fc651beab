"""The list of methods on the terminal. Source: this project."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.plugins import tables  # noqa: F401 - makes the tables
from rayfed_lora.plugins.registry import KEYS, TABLES, Method

# Where recipes name methods of a kind, where that is not one key.
_NAMED_BY = {"metric": "evaluation.metrics", "update": "wire.up, wire.down, clients.attack"}
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def show_methods(console: PlainConsole) -> None:
    """Print the methods of each kind with options, sources and where they come from."""
    for kind, table in TABLES.items():
        console.print_line(f"{kind} ({_NAMED_BY.get(kind) or KEYS[kind].removesuffix('.name')})")
        rows = [_row(method) for method in table.methods()]
        if rows:
            console.print_rows(rows, prose="options, summary")
        else:
            console.print_line("none but those of plug-ins")


def _row(method: Method[Any]) -> dict[str, str]:
    where = "built in" if method.built_in else method.module
    options = ", ".join(_options(method.options))
    summary = getattr(method.value, "summary", method.summary)
    return {
        "name": method.name,
        "from": where,
        "options, summary": f"{options}; {summary}" if options else summary,
        "source": _source(method),
    }


def _source(method: Method[Any]) -> str:
    """Return the paper that a method names: its declared source, or one in its docstring."""
    declared = getattr(method.value, "source", "")
    if declared:
        return f"arXiv:{declared}" if re.fullmatch(r"\d{4}\.\d{4,5}", declared) else declared
    found = _ARXIV.search(method.target.__doc__ or "")
    return found.group() if found else ""


def _options(model: type[BaseModel]) -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        default = "" if field.default is PydanticUndefined else f"={field.default}"
        found.append(f"{name}{default}")
    return found
