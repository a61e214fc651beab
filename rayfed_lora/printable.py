"""Untrusted texts made safe for a terminal and for the cells of a spreadsheet.

Names, notes, errors and logs may contain escape sequences, which move a terminal's cursor, change
its title or type answers, and characters that reverse the reading order. A spreadsheet evaluates
cells that begin like a formula. Source: this project; cells: OWASP, "CSV Injection".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

# C0 and C1 controls but tab and line feed, direction marks, other line ends, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_BREAKS = re.compile(r"[\t\n]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")


def printable(text: str, *, lines: bool = True) -> str:
    r"""Return a text with every control character escaped; `lines` keeps line breaks and tabs.

    >>> printable("a\x1b[31mb\r\nc")
    'a\\x1b[31mb\nc'
    >>> printable("a\nb", lines=False)
    'a\\nb'
    """
    found = _CONTROL.sub(_escaped, text.replace("\r\n", "\n"))
    return found if lines else _BREAKS.sub(_escaped, found)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def client_label(client: int, names: Sequence[str] | Mapping[int, str] | None) -> str:
    """Return a client's number, and its name where the two differ.

    >>> client_label(3, None), client_label(1, ["0", "1"]), client_label(1, ["mia", "bob"])
    ('client 3', 'client 1', "client 1 ('bob')")
    """
    name = str(client) if names is None else names[client]
    return f"client {client}" if name == str(client) else f"client {client} ({name!r})"


def echo(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a text without control characters to stdout or `file`, and flush."""
    print(printable(text), end=end, file=sys.stdout if file is None else file, flush=True)


def cell(value: Any) -> Any:
    """Return a value as a spreadsheet cell: a quote precedes texts that begin like a formula.

    >>> cell("=1+1"), cell("-0.5"), cell(-0.5)
    ("'=1+1", '-0.5', -0.5)
    """
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}" if value.lstrip(" ").startswith(_FORMULA) else value
