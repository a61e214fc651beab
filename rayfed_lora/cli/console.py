"""The console that commands print to. Source: this project, on rich."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rayfed_lora.printable import printable

# Width where stdout is no terminal and COLUMNS is not set; rich would assume 80.
_NO_TERMINAL = 160
# Least width of a column of prose.
_PROSE = 24
_GAP = 2


class PlainConsole(Console):
    """A console that prints texts as they are: no control characters, markup or highlighting.

    Colours and cursor movements come from rich itself.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if "width" not in options and "COLUMNS" not in os.environ and not self.is_terminal:
            self.width = _NO_TERMINAL

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of a renderable; everything that is printed passes through here."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)

    def print_line(self, text: str, style: str | None = None) -> None:
        """Print a line; in a terminal it is wrapped between words, which stay whole."""
        if self.is_terminal:
            wrapper = textwrap.TextWrapper(
                self.width, break_long_words=False, break_on_hyphens=False
            )
            text = "\n".join(wrapper.fill(line) for line in text.split("\n"))
        self.print(text, style=style, soft_wrap=True)

    def print_facts(self, facts: Mapping[str, str]) -> None:
        """Print a line for each name and text, never wrapped: commands and paths are copied."""
        for name, text in facts.items():
            self.print(f"{name}: {printable(text, lines=False)}", soft_wrap=True)

    def warn(self, note: str) -> None:
        """Print a note to the user as a warning; its lines after the first are indented."""
        self.print_line("warning: " + printable(note).replace("\n", "\n  "), "yellow")

    def print_rows(
        self,
        rows: Sequence[Mapping[str, str]],
        *,
        optional: Sequence[str] = (),
        left: Collection[str] = (),
        prose: str | None = None,
    ) -> None:
        """Print a table no wider than the console, without cutting any text.

        Args:
            rows: texts by column, one or more rows of the same columns.
            optional: columns that may be left out, the first of them first; those left out are
                named below the table.
            left: columns aligned to the left, as the first one is.
            prose: a column whose texts may take several lines.
        """
        names = list(rows[0])
        widths = {name: _width(name, rows) for name in names}
        needed = widths | ({} if prose is None else {prose: min(widths[prose], _PROSE)})
        dropped: list[str] = []
        while (too_wide := sum(needed[n] + _GAP for n in names) - _GAP > self.width) and (
            left_out := next((name for name in optional if name in names), None)
        ):
            names.remove(left_out)
            dropped.append(left_out)
        # With room to spare, the names of columns take one line.
        unbroken = {n: max(needed[n], cell_len(n)) for n in names}
        if sum(unbroken.values()) + _GAP * (len(names) - 1) <= self.width:
            widths |= {n: max(widths[n], cell_len(n)) for n in names}
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        for i, name in enumerate(names):
            side = "left" if i == 0 or name in left or name == prose else "right"
            # Where it is all too wide, the names in the first column take several lines.
            width = None if name == prose or (i == 0 and too_wide) else widths[name]
            table.add_column(name, justify=side, width=width, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            # As Text, never markup: anyone may have written these.
            table.add_row(*(Text(printable(row[name], lines=False)) for name in names))
        self.print(table)
        if dropped:
            self.print_line(f"not shown at {self.width} columns: {', '.join(dropped)}", "dim")


def _width(name: str, rows: Sequence[Mapping[str, str]]) -> int:
    """Return the width of a column: of its longest text, and of the longest word of its name."""
    cells = (cell_len(printable(row[name], lines=False)) for row in rows)
    return max(*cells, *map(cell_len, name.split() or [""]))


def fitted(width: int, parts: Sequence[tuple[int, str]]) -> str:
    """Return texts joined by two spaces, without those that do not fit into `width`.

    Each text comes with its place in the order in which texts are chosen; those of place 0 are
    always there.

    >>> fitted(12, [(0, "round 1/9"), (2, "1.50 MB"), (1, "2 s")])
    'round 1/9'
    >>> fitted(14, [(0, "round 1/9"), (2, "1.50 MB"), (1, "2 s")])
    'round 1/9  2 s'
    """
    kept = [i for i, (place, _) in enumerate(parts) if place == 0]
    for i in sorted(range(len(parts)), key=lambda i: parts[i][0]):
        more = sorted({*kept, i})
        if cell_len("  ".join(parts[j][1] for j in more)) <= width:
            kept = more
    return "  ".join(parts[i][1] for i in kept)
