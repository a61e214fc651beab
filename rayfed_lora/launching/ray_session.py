"""The connection to a cluster, or to an own Ray of one command. Source: this project.

An own Ray's token is in a file that only the user can read. Ray itself would write
`~/.ray/auth_token` readable for every user of the machine; the token lets its holder run commands
as the user.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rayfed_lora.errors import ResourceError
from rayfed_lora.jobs.dashboard import unreachable_cluster
from rayfed_lora.launching.agent_ports import chosen_agent_ports

NAMESPACE = "rayfed_lora"
# Set before an own Ray starts; a value that the user has set stays.
_OWN_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    # Nothing reads the metrics of a Ray that ends with its run; to collect them took 1 % of a core.
    "RAY_enable_metrics_collection": "0",
    # Bytes up to which a result travels inside the reply to its call (Ray's default: 100 kB).
    # Larger results go through the object store: 1.5 ms later on two busy cores.
    "RAY_max_direct_call_object_size": str(1 << 19),
}


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to the cluster at `address` or $RAY_ADDRESS, or start an own Ray for the block.

    Raises:
        ResourceError: no cluster answers at the address, or Ray cannot start.
    """
    where = address or os.environ.get("RAY_ADDRESS")
    if where is None:
        for name, value in _OWN_RAY.items():
            # Ray reads this one at import: set later, it would apply to the processes that Ray
            # starts, but not to this process.
            if name != "RAY_AUTH_MODE" or "ray" not in sys.modules:
                os.environ.setdefault(name, value)
    elif (reason := unreachable_cluster(where)) is not None:
        raise ResourceError(f"no Ray cluster at {where}: {reason}")
    import ray

    if ray.is_initialized():
        yield
        return
    if where is None:
        keep_token_private()
    settings = {"namespace": NAMESPACE, "logging_level": "ERROR", "log_to_driver": False}
    try:
        if where is None:
            with chosen_agent_ports():
                ray.init(address="local", include_dashboard=False, **settings)
        else:
            ray.init(address=where, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(f"no Ray cluster at {where or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def keep_token_private() -> None:
    """Create Ray's token file with mode 0600, or restrict an existing one to its owner.

    Another user's file, or a link, stays as it is.
    """
    elsewhere = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if elsewhere or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    # No writable home folder: Ray raises if it needs one.
    with suppress(OSError, RuntimeError):
        path = Path.home() / ".ray" / "auth_token"
        try:
            _make(path)
        except FileExistsError:
            _restrict(path)


def _restrict(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        found = os.fstat(handle)
        if found.st_uid == os.geteuid() and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def _make(path: Path) -> None:
    """Create the file with its content in one step: another run may be reading it."""
    if os.path.lexists(path):
        raise FileExistsError(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    token = secrets.token_hex(32)  # 256 bits, as Ray's own
    try:
        _write(scratch, token)
        try:
            os.link(scratch, path)
        except FileExistsError:
            raise
        except OSError:  # a filesystem without hard links
            _write(path, token)
    finally:
        scratch.unlink(missing_ok=True)


def _write(path: Path, token: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(token)
    except OSError:  # Ray would read an empty file as a token
        path.unlink(missing_ok=True)
        raise
