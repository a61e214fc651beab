"""Where an own Ray keeps its files, and their removal. Source: this project.

Ray makes a folder of sockets, logs and spilled objects for each session, and never removes it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from rayfed_lora.errors import ResourceError
from rayfed_lora.runs.leases.record import Record, Ticket, is_alive

_DEFAULT = "/tmp"
# The longest name that Ray makes below its temporary folder; the number is a process id.
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
# Bytes that a Unix socket's path may have.
_SOCKET_BYTES = 107 if sys.platform == "linux" else 103
# Names the process that started the session.
_OWNER = "rayfed_lora.owner.json"
# Logs of a run that failed or was killed stay for so long.
_KEPT_S = 24 * 3600.0
_TRIES = 20


def usable_folder() -> tuple[str | None, str | None]:
    """Return the folder for Ray's files, None for Ray's default; and a note where it differs.

    Raises:
        ResourceError: no folder can be used; says why, and what to set.
    """
    # Ray reads TMPDIR only on Linux.
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    name = next((name for name in names if name in os.environ), None)
    given = _DEFAULT if name is None else os.environ[name]
    fault = _fault(given)
    if fault is None:
        return None, None
    text = f"Ray cannot keep its files in {given}{'' if name is None else f' ({name})'}: {fault}"
    if given == _DEFAULT or _fault(_DEFAULT) is not None:
        longest = _SOCKET_BYTES - len(_SOCKET)
        wanted = f"a folder that can be written, with a path of at most {longest} bytes"
        raise ResourceError(f"{text}; set RAY_TMPDIR to {wanted}")
    return f"{_DEFAULT}/ray", f"{text}; they are in {_DEFAULT}/ray"


def _fault(root: str) -> str | None:
    path = os.path.abspath(root)
    excess = len(os.fsencode(path + _SOCKET)) - _SOCKET_BYTES
    if excess > 0:
        return f"the path is {excess} bytes too long for Ray's sockets"
    path = os.path.join(path, "ray")
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        return f"{path} is no folder"
    return None if os.access(path, os.W_OK | os.X_OK) else f"{path} cannot be written"


def mark(session: Path) -> None:
    """Note in a session's folder that this process has started it."""
    with suppress(OSError):
        (session / _OWNER).write_bytes(Record.new(Ticket.of_this_process()).content())


def remove(session: Path) -> None:
    """Remove the folder of a session that has ended, and Ray's link to it."""
    for _ in range(_TRIES):
        shutil.rmtree(session, ignore_errors=True)
        if not session.exists():
            break
        time.sleep(0.1)  # a worker that is ending writes its last lines
    latest = session.with_name("session_latest")
    # Ray replaces a link to a folder, but not one that leads nowhere.
    with suppress(OSError):
        if os.readlink(latest) == str(session):
            latest.unlink()


def remove_abandoned(folder: Path) -> None:
    """Remove session folders of this user's commands that failed or were killed a day ago."""
    for session in folder.glob("session_*_*"):
        with suppress(OSError):
            marked = (session / _OWNER).lstat()
            own = marked.st_uid == session.lstat().st_uid == os.geteuid()
            if own and time.time() - marked.st_mtime > _KEPT_S:
                record = Record.read((session / _OWNER).read_bytes())
                if record is not None and is_alive(record.owner) is False:
                    remove(session)
