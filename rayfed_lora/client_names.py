"""Labels of clients in messages. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def client_label(client: int, names: Sequence[str] | Mapping[int, str] | None) -> str:
    """Return a client's number, and its name where the two differ.

    >>> client_label(3, None), client_label(1, ["0", "1"]), client_label(1, ["mia", "bob"])
    ('client 3', 'client 1', "client 1 ('bob')")
    """
    name = str(client) if names is None else names[client]
    return f"client {client}" if name == str(client) else f"client {client} ({name!r})"
