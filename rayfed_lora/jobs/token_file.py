"""The token of a Ray of our own, in a file that nobody else can read.

Ray writes `~/.ray/auth_token` when the first local run needs it, readable for everybody on the
machine: with the token, commands can be run as the user.

Source: this project.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
# Where a user says otherwise, the token is the user's to keep.
_ELSEWHERE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def keep_token_private() -> None:
    """Make Ray's token before Ray does, with mode 0600; take others' rights from one that is there.

    A file that is another user's, or a link, stays as it is.
    """
    if any(os.environ.get(name) for name in _ELSEWHERE):
        return
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        _make(path)
        return
    except FileExistsError:
        pass
    except (OSError, RuntimeError):
        # No home that can be written: Ray says so where it needs one.
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
    """Make the file at once with its content: another run may be looking for it.

    Raises:
        FileExistsError: it is there.
    """
    if os.path.lexists(path):
        raise FileExistsError(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # As Ray's own: 256 bits.
    token = secrets.token_hex(32)
    try:
        _write(scratch, token)
        try:
            os.link(scratch, path)
        except FileExistsError:
            raise
        except OSError:
            # A filesystem without hard links.
            _write(path, token)
    finally:
        scratch.unlink(missing_ok=True)


def _write(path: Path, token: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(token)
    except OSError:
        # An empty file would be taken for a token.
        path.unlink(missing_ok=True)
        raise
