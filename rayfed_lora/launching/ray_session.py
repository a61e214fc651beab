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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayfed_lora.errors import BadInputError, InterruptedRunError, ResourceError, RunError
from rayfed_lora.jobs.dashboard import unreachable_cluster
from rayfed_lora.launching import session_folders
from rayfed_lora.launching.agent_ports import chosen_agent_ports
from rayfed_lora.runs.claiming import say

NAMESPACE = "rayfed_lora"
_TOKEN_BYTES = 32  # 256 bits, as Ray's own
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


class RayLostError(RunError):
    """Ray has ended under a run; nothing can be asked of it any more."""


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
    settings = {"namespace": NAMESPACE, "logging_level": "ERROR", "log_to_driver": False}
    with _without_prints(), _own_ray(settings) if where is None else _cluster(where, settings):
        yield


@contextmanager
def _cluster(address: str, settings: Mapping[str, Any]) -> Iterator[None]:
    import ray

    with _errors_of(f"no Ray cluster at {address}"):
        ray.init(address=address, **settings)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_ray(settings: Mapping[str, Any]) -> Iterator[None]:
    """Start a Ray for the block; its files are kept where the block fails, for their logs."""
    import ray

    keep_token_private()
    folder, note = session_folders.usable_folder()
    if note is not None:
        say(note)
    with _errors_of("Ray did not start on this machine"), chosen_agent_ports():
        context = ray.init(address="local", include_dashboard=False, _temp_dir=folder, **settings)
    session = Path(context.address_info["session_dir"])
    session_folders.mark(session)
    session_folders.remove_abandoned(session.parent)
    failed = True
    try:
        yield
        failed = False
    except (InterruptedRunError, BadInputError):
        failed = False
        raise
    except RayLostError:
        with _without_stderr():
            # First: Ray's own shutdown would wait for what is lost.
            ray._private.worker._global_node.kill_all_processes(check_alive=False)
            ray.shutdown()
        raise
    finally:
        ray.shutdown()
        if not failed:
            session_folders.remove(session)


@contextmanager
def _without_prints() -> Iterator[None]:
    """Keep Ray from printing to stdout what `log_to_driver` does not keep back: a raylet's log."""
    from ray._private import worker

    # Private; where a version of Ray lacks it, nothing changes.
    original = getattr(worker, "print_to_stdstream", None)
    worker.print_to_stdstream = lambda *args, **options: None
    try:
        yield
    finally:
        worker.print_to_stdstream = original


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what this process writes to stderr: Ray's threads tell each second of what is lost."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Raise a ResourceError for what Ray raises as it starts or connects: any kind of error."""
    try:
        yield
    except Exception as error:
        hint = "is it busy, or short of memory? runtime.executor local runs without Ray"
        raise ResourceError(f"{what} ({hint}): {error}") from error


def keep_token_private() -> None:
    """Create Ray's token file with mode 0600, or restrict an existing one to its owner.

    Another user's file, or a link, stays as it is. Without a file that can be read, the token is in
    the environment, which only the user's processes can read.
    """
    elsewhere = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if elsewhere or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        try:
            _make(path)
        except FileExistsError:
            _restrict(path)
        readable = os.access(path, os.R_OK)
    except (OSError, RuntimeError):  # no writable home folder
        readable = False
    if not readable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(_TOKEN_BYTES)


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
    token = secrets.token_hex(_TOKEN_BYTES)
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
