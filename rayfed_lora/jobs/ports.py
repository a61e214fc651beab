"""TCP ports: a quick check before Ray, which would wait for minutes. Source: this project."""

from __future__ import annotations

import socket

_CONNECT_S = 10.0


def unreachable(host: str, port: int) -> str | None:
    """Return why a TCP port accepts no connection, None if it does."""
    try:
        socket.create_connection((host, port), _CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        return str(error)
    return None


def unreachable_cluster(address: str) -> str | None:
    """Return why `host:port` accepts no connection, None if it does or is another address."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return None
    return unreachable(host.strip("[]"), int(port))
