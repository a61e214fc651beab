"""The console that commands print to. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from rayfed_lora.printable import printable


class PlainConsole(Console):
    """A console that prints texts as they are: no control characters, markup or highlighting.

    Colours and cursor movements come from rich itself.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

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
        """Print a line without wrapping it."""
        self.print(text, style=style, soft_wrap=True)

    def warn(self, note: str) -> None:
        """Print a note to the user as a warning; its lines after the first are indented."""
        self.print_line("warning: " + printable(note).replace("\n", "\n  "), "yellow")

    def widened(self, width: int) -> PlainConsole:
        """Return a console `width` columns wide if stdout is no terminal: rich would assume 80."""
        return self if self.is_terminal else PlainConsole(width=width)
