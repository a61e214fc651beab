"""Where an own Ray keeps its files, and which of them are removed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rayfed_lora.errors import ResourceError
from rayfed_lora.launching import session_folders

DAY_S = 24 * 3600


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def session(folder: Path, name: str) -> Path:
    made = folder / name
    (made / "logs").mkdir(parents=True)
    (made / "logs" / "raylet.out").touch()
    return made


def age(session: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(session / "rayfed_lora.owner.json", (then, then))


def marked_by_a_process_that_has_ended(session: Path) -> None:
    code = "import sys; from pathlib import Path; from rayfed_lora.launching import session_folders"
    mark = f"{code}; session_folders.mark(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", mark, str(session)], check=True)


def test_ray_chooses_its_folder_where_that_can_be_used(monkeypatch):
    assert session_folders.usable_folder() == (None, None)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        assert session_folders.usable_folder() == (None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="Ray reads TMPDIR only on Linux")
@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_path_too_long_for_sockets_gives_way_to_a_short_one(name, monkeypatch):
    # 107 bytes in all; 68 of them are /ray/session_.../sockets/plasma_store.
    monkeypatch.setenv(name, "/" + 38 * "x")
    assert session_folders.usable_folder()[0] is None
    monkeypatch.setenv(name, "/" + 39 * "x")
    folder, note = session_folders.usable_folder()
    assert folder == "/tmp/ray"
    assert note is not None and "1 bytes too long" in note and name in note


@pytest.mark.parametrize(
    ("given", "fault"),
    [("/dev/null", "/dev/null is no folder"), ("/proc/self/x", "/proc/self cannot be written")],
)
def test_a_folder_that_cannot_be_written_gives_way_to_another(given, fault, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", given)
    folder, note = session_folders.usable_folder()
    assert folder == "/tmp/ray"
    assert (
        note == f"Ray cannot keep its files in {given} (RAY_TMPDIR): {fault}; they are in {folder}"
    )
    monkeypatch.setattr(session_folders, "_DEFAULT", "/proc/self/nothing")
    with pytest.raises(ResourceError, match="set RAY_TMPDIR to a folder that can be written"):
        session_folders.usable_folder()


def test_a_session_is_removed_with_the_link_to_it(tmp_path):
    mine, other = session(tmp_path, "session_a_1"), session(tmp_path, "session_b_2")
    latest = tmp_path / "session_latest"
    latest.symlink_to(other)
    session_folders.remove(mine)
    assert not mine.exists() and latest.exists()
    session_folders.remove(other)
    assert os.listdir(tmp_path) == []


def test_only_old_sessions_of_commands_that_have_ended_are_removed(tmp_path):
    names = ("session_a_dead", "session_b_recent", "session_c_alive")
    dead, recent, alive = (session(tmp_path, name) for name in names)
    session(tmp_path, "session_d_unmarked")
    marked_by_a_process_that_has_ended(dead)
    marked_by_a_process_that_has_ended(recent)
    session_folders.mark(alive)
    for each, seconds in ((dead, 1.1 * DAY_S), (recent, 0.9 * DAY_S), (alive, 9 * DAY_S)):
        age(each, seconds)
    (tmp_path / "session_e_damaged").mkdir()
    (tmp_path / "session_e_damaged" / "rayfed_lora.owner.json").write_bytes(b"{")
    age(tmp_path / "session_e_damaged", 9 * DAY_S)
    (tmp_path / "session_latest").symlink_to(dead)
    session_folders.remove_abandoned(tmp_path)
    left = {"session_b_recent", "session_c_alive", "session_d_unmarked", "session_e_damaged"}
    assert {*os.listdir(tmp_path)} == left
