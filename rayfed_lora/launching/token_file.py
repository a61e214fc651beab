"""The token of an own Ray, in a file that only the user can read. Source: this project.

Ray itself would write `~/.ray/auth_token` readable for every user of the machine; the token lets
its holder run commands as the user.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def keep_token_private() -> None:
    """Create Ray's token file with mode 0600, or restrict an existing one to its owner.

    Another user's file, or a link, stays as it is.
    """
    elsewhere = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if elsewhere or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        _make(path)
        return
    except FileExistsError:
        pass
    except (OSError, RuntimeError):  # no writable home folder: Ray raises if it needs one
        return
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            found = os.fstat(handle)
            if found.st_uid == os.geteuid() and found.st_mode & _OTHERS:
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
