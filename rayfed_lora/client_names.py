"""What a client is called in messages. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def called(client: int, names: Sequence[str] | Mapping[int, str] | None) -> str:
    """Return how a message names a client: its number, and its name where that says more.

    >>> called(3, None), called(1, ["0", "1"]), called(1, ["mia", "bob"])
    ('client 3', 'client 1', "client 1 ('bob')")
    """
    name = str(client) if names is None else names[client]
    return f"client {client}" if name == str(client) else f"client {client} ({name!r})"
