"""Ray's token is the user's alone from its first byte on."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayfed_lora.launching.ray_session import keep_token_private


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a token that does not exist yet, under a umask that hides nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        # Set first: so that whatever is set meanwhile is taken back, too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path / ".ray" / "auth_token"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_the_user_alone_and_stays(path):
    before = os.umask(0)
    try:
        keep_token_private()
    finally:
        os.umask(before)
    token = path.read_text()
    assert mode(path) == 0o600 and len(token) == 64 and int(token, 16) > 0
    keep_token_private()
    assert path.read_text() == token
    assert os.listdir(path.parent) == ["auth_token"]


def test_others_lose_their_rights_to_one_that_is_there(path):
    path.parent.mkdir()
    path.write_text("f" * 64)
    path.chmod(0o644)
    keep_token_private()
    assert mode(path) == 0o600 and path.read_text() == "f" * 64


def test_starts_at_the_same_time_agree_on_one_whole_token(path):
    def found(_: int) -> str:
        keep_token_private()
        return path.read_text()

    with ThreadPoolExecutor(8) as threads:
        tokens = set(threads.map(found, range(64)))
    assert len(tokens) == 1 and len(tokens.pop()) == 64


@pytest.mark.parametrize(
    ("name", "value"),
    [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x"), ("RAY_AUTH_MODE", "disabled")],
)
def test_a_user_who_says_otherwise_gets_no_file(path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    keep_token_private()
    assert not path.exists()


def test_a_link_is_left_alone(path, tmp_path):
    path.parent.mkdir()
    (tmp_path / "shared").write_text("f" * 64)
    (tmp_path / "shared").chmod(0o644)
    path.symlink_to(tmp_path / "shared")
    keep_token_private()
    assert mode(tmp_path / "shared") == 0o644


def test_without_hard_links_the_token_is_made_all_the_same(path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    before = os.umask(0)
    try:
        keep_token_private()
    finally:
        os.umask(before)
    assert mode(path) == 0o600 and len(path.read_text()) == 64
    assert os.listdir(path.parent) == ["auth_token"]


@pytest.mark.parametrize("home", ["file", "proc"])
def test_without_a_home_that_can_be_written_the_token_is_in_the_environment(
    path, tmp_path, monkeypatch, home
):
    (tmp_path / "file").write_text("")
    # Nothing can be made below either, not even by root.
    monkeypatch.setenv("HOME", str(tmp_path / "file") if home == "file" else "/proc/self")
    keep_token_private()
    assert not path.exists()
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64 and int(token, 16) > 0


def test_ray_takes_that_token(path):
    from ray._private.authentication import authentication_token_setup as setup

    keep_token_private()
    assert setup._get_default_token_path() == path
