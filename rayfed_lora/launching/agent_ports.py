"""Ports for the agents of an own Ray, so that its node does not wait for their start.

An agent that chooses its own port first imports for seconds, and the node waits for that port:
3 of 7 seconds on two cores (Ray 2.60). `ray start` has options for these ports, `ray.init` none.

Source: this project.
"""

from __future__ import annotations

import errno
import inspect
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

_NAMES = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
_FIRST, _TRIES = 10_000, 100
# The first and the last port that Linux gives to outgoing connections.
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextmanager
def chosen_agent_ports() -> Iterator[None]:
    """Choose the agents' ports while `ray.init` runs in the block; other own Rays leave them free.

    Where this cannot be done (not on Linux, no free ports, another Ray inside), Ray chooses.
    """
    try:
        from ray._private import parameter

        original = parameter.RayParams
    except (ImportError, AttributeError):
        yield
        return
    known = inspect.signature(original).parameters
    ports = _free_ports([name for name in _NAMES if name in known])
    parameter.RayParams = partial(original, **ports)
    try:
        yield
    finally:
        parameter.RayParams = original


def _free_ports(names: list[str]) -> dict[str, int]:
    """Return different free ports below the ephemeral ones; none if too few are found."""
    if sys.platform != "linux":
        return {}
    last = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32_768
    ports: dict[str, int] = {}
    with ExitStack() as probes:
        for _ in range(_TRIES if last > 2 * _FIRST else 0):
            if len(ports) == len(names):
                return ports
            port = _FIRST + secrets.randbelow(last - _FIRST)
            if _reserved(port):
                try:
                    probes.enter_context(socket.create_server(("", port)))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        break
                else:
                    ports[names[len(ports)]] = port
    return {}


# Open as long as this process: the kernel knows their names, and frees them.
_reservations: list[socket.socket] = []


def _reserved(port: int) -> bool:
    """Reserve a port among own Rays that share this network; False where another one has it.

    An agent binds its port seconds later. Until then only this name says that it is taken.
    """
    reservation = socket.socket(socket.AF_UNIX)
    try:
        # An abstract name: no file, one name space for a network name space.
        reservation.bind(f"\0rayfed_lora agent port {port}")
    except OSError:
        reservation.close()
        return False
    _reservations.append(reservation)
    return True
