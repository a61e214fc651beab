"""The run folder: files whole or not at all, here and on other filesystems."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.storage import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def everything_in(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_opening_a_folder_makes_nothing(tmp_path, folder):
    assert not (tmp_path / "run").exists()
    assert folder.names() == []
    assert not folder.exists("a")


def test_what_was_written_is_read_back_and_replaced_by_the_next_write(tmp_path, folder):
    folder.write("sub/deep/a.bin", b"\x00first")
    folder.write("sub/deep/a.bin", b"second\xff")
    assert folder.read("sub/deep/a.bin") == b"second\xff"
    assert everything_in(tmp_path) == ["run/sub/deep/a.bin"]


def test_an_empty_file_is_a_file(folder):
    folder.write("a", b"")
    assert folder.exists("a")
    assert folder.read("a") == b""


def test_written_files_can_be_read_by_all(tmp_path, folder):
    folder.write("a", b"x")
    assert (tmp_path / "run" / "a").stat().st_mode & 0o777 == 0o644


def test_asking_whether_a_folder_can_be_written_leaves_no_folder_behind(tmp_path):
    RunFolder(tmp_path / "new" / "deep" / "run").check_writable()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    RunFolder(tmp_path / "there" / "run").check_writable()
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_disk_that_is_full_is_a_run_error_and_leaves_the_old_content(
    tmp_path, folder, monkeypatch
):
    folder.write("a", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*/run/a: No space left on device"):
        folder.write("a", b"new content")
    assert folder.read("a") == b"old"
    assert everything_in(tmp_path) == ["run/a"]


def test_a_rename_that_fails_is_a_run_error_and_leaves_the_old_content(
    tmp_path, folder, monkeypatch
):
    folder.write("a", b"old")

    def refused(source: str, target: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(RunError, match="Input/output error"):
        folder.write("a", b"new content")
    assert folder.read("a") == b"old"
    assert everything_in(tmp_path) == ["run/a"]


def test_a_network_folder_without_fsync_of_folders_and_permissions_will_do(
    tmp_path, folder, monkeypatch
):
    sync = os.fsync

    def of_files_only(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    def refused(path: str, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", of_files_only)
    monkeypatch.setattr(os, "chmod", refused)
    folder.write("a", b"old")
    folder.write("a", b"new")
    assert folder.read("a") == b"new"
    assert everything_in(tmp_path) == ["run/a"]


def test_a_folder_that_cannot_be_saved_after_the_rename_is_a_run_error(folder, monkeypatch):
    sync = os.fsync

    def broken_for_folders(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EIO, "Input/output error")
        sync(handle)

    monkeypatch.setattr(os, "fsync", broken_for_folders)
    with pytest.raises(RunError, match="Input/output error"):
        folder.write("a", b"x")


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/passwd", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, folder, name):
    (tmp_path / "a").write_text("not the run's")
    asks = (folder.read, folder.exists, folder.names, folder.remove, folder.open_to_read)
    for ask in (*asks, lambda name: folder.write(name, b"x")):
        with pytest.raises(RunFolderError, match="expected a name inside the folder"):
            ask(name)
    assert everything_in(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_looked_into_is_a_run_folder_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFolderError, match=r"expected a folder that can be read .*run"):
        RunFolder(tmp_path / "run").names()


def test_a_kill_before_the_rename_leaves_no_scratch_file(tmp_path, folder, monkeypatch):
    def interrupted(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.write("a", b"new")
    assert everything_in(tmp_path) == []


def test_reading_what_is_not_there_is_an_os_error(folder):
    with pytest.raises(OSError, match="nothing"):
        folder.read("nothing")


def test_names_are_sorted_and_of_one_level_only(folder):
    for name in ("c", "a", "sub/x", "sub/deep/y"):
        folder.write(name, b"1")
    assert folder.names() == ["a", "c", "sub"]
    assert folder.names("sub") == ["deep", "x"]
    assert folder.names("not-there") == []


def test_files_and_whole_folders_are_removed_and_what_is_not_there_is_no_fault(folder):
    for name in ("a", "sub/x", "sub/deep/y", "kept"):
        folder.write(name, b"1")
    folder.remove("a")
    folder.remove("sub")
    folder.remove("not-there")
    assert folder.names() == ["kept"]
    assert not folder.exists("sub")
    assert folder.exists("kept")


def test_a_check_for_writing_leaves_nothing_behind(tmp_path, folder):
    folder.check_writable()
    assert everything_in(tmp_path) == []


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFolderError, match=r"expected a folder that can be written; .*run"):
        RunFolder(tmp_path / "run").check_writable()
    assert (tmp_path / "run").read_text() == "a file"


def test_a_folder_that_refuses_a_file_is_named(tmp_path, folder, monkeypatch):
    def refused(suffix: str, prefix: str, dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(RunFolderError, match="Permission denied"):
        folder.check_writable()


def test_a_relative_path_stays_where_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder.write("a", b"1")
    assert everything_in(tmp_path) == ["run/a"]
    assert folder.local == tmp_path / "run"


def test_a_file_uri_is_a_local_folder(tmp_path):
    folder = RunFolder(f"file://{tmp_path}/run")
    folder.write("sub/a", b"1")
    assert folder.local == tmp_path / "run"
    assert everything_in(tmp_path) == ["run/sub/a"]
    assert folder.location == f"file://{tmp_path}/run"


def test_an_unknown_kind_of_uri_is_a_run_folder_error():
    with pytest.raises(RunFolderError, match="run folder nosuch://bucket/a"):
        RunFolder("nosuch://bucket/a")


@pytest.fixture
def elsewhere() -> RunFolder:
    """A folder on pyarrow's file system in memory, the nearest to an object store without one."""
    folder = RunFolder("mock://host/runs")
    # Unlike an object store it wants its folders made.
    folder._fs.create_dir("runs/sub", recursive=True)
    return folder


def test_a_folder_on_another_filesystem_is_written_read_listed_and_removed(elsewhere):
    assert elsewhere.local is None
    elsewhere.write("b", b"old")
    elsewhere.write("b", b"new")
    elsewhere.write("sub/x", b"1")
    assert elsewhere.read("b") == b"new"
    assert elsewhere.names() == ["b", "sub"]
    assert elsewhere.names("sub") == ["x"]
    elsewhere.remove("sub")
    elsewhere.remove("b")
    assert elsewhere.names() == []
    assert not elsewhere.exists("sub/x")


def test_another_filesystem_is_checked_for_writing_too(elsewhere):
    elsewhere.check_writable()
    assert elsewhere.names() == ["sub"]


def test_what_cannot_be_written_on_another_filesystem_is_a_run_error(elsewhere):
    with pytest.raises(RunError, match="cannot write runs/not/there"):
        elsewhere.write("not/there/x", b"1")


def test_a_uri_with_a_fragment_is_refused_since_names_after_it_would_be_lost():
    with pytest.raises(RunFolderError, match="without '#'"):
        RunFolder("s3://bucket/comparison#1/fedavg/seed-0")


def test_what_another_process_removes_in_between_is_removed(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    for name in ("file", "folder/file"):
        folder.write(name, b"")
    real = RunFolder._info

    def seen(self, name):
        info = real(self, name)
        RunFolder(tmp_path)._fs.move(info.path, f"{info.path}-removed")
        return info

    monkeypatch.setattr(RunFolder, "_info", seen)
    for name in ("file", "folder"):
        folder.remove(name)
    assert folder.names() == ["file-removed", "folder-removed"]
