"""The console that commands print to. Source: this project, on rich."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from rayfed_lora.printable import printable


class PlainConsole(Console):
    """A console that obeys nothing in the texts it prints: no control characters, no markup.

    Colours and the cursor are rich's own, from styles.
    """

    def __init__(self, **options: Any) -> None:
        """Open stdout; options as of rich's `Console`."""
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is shown of a renderable; all that is printed comes by here."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
