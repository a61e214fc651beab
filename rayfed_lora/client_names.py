"""What a client is called in messages. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def called(client: int, names: Sequence[str] | Mapping[int, str] | None) -> str:
    """Return how a message names a client: its number, and its name where there is one.

    >>> called(3, None), called(1, ["mia", "bob"])
    ('client 3', "client 1 ('bob')")
    """
    return f"client {client}" if names is None else f"client {client} ({names[client]!r})"
