"""A run folder with a damaged, cut or deleted file: the same result, or an error that names it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfed_lora.errors import RunFolderError
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.launching.launch import Result
from rayfed_lora.runs import checksums, seals, trackers
from rayfed_lora.runs.claiming import complete, kept_recipe
from rayfed_lora.runs.reading import read_run
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from tests.fakes import Behaviour, local_engine, make_recipe
from tests.property.test_hostile_checkpoints import damage

QUICK = settings(max_examples=60, deadline=None)
RECIPE = make_recipe(
    evaluation__client_fraction=0.5, evaluation__clients_every=1, clients__max_failed=1
)
FAILING = Behaviour(failing=frozenset((client, t) for client in (0, 1) for t in range(6)))
TABLES = ("rounds.parquet", "clients.parquet", "client_metrics.parquet", "notes.parquet")
KEPT = ("recipe.yaml", *TABLES, "partition.parquet")
LISTED = (*KEPT, "summary.json", "adapter/fake.json")
# Further files of the exported model.
BESIDE = ("adapter_config.json", "adapter_model.safetensors", "README.md")
# Written again by `--resume`.
REMADE = ("partition.parquet", "summary.json", "adapter/fake.json", "SHA256SUMS")


def go_on(folder: RunFolder, rounds: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Run some rounds, or to the end; return the summary and the notes."""
    recipe = kept_recipe(folder) or RECIPE
    board = StatusBoard(6)
    executor = local_engine(recipe, FAILING)
    going = simulate_rounds(recipe, executor, folder, board, lambda: False, resume=True)
    while True:
        try:
            tables = next(going)
        except StopIteration as end:
            return end.value, list(board.status().notes)
        if tables.rounds.num_rows == rounds:
            going.close()
            return {}, list(board.status().notes)


@cache
def files_of(rounds: int | None) -> dict[str, bytes]:
    with TemporaryDirectory() as path:
        go_on(RunFolder(path), rounds)
        root = Path(path)
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def unpacked(files: dict[str, bytes], path: str | Path) -> RunFolder:
    folder = RunFolder(path)
    for name, content in files.items():
        folder.write(name, content)
    return folder


def outcome(folder: RunFolder) -> dict[str, Any]:
    """Return all that a finished run says but its times and versions."""
    summary = json.loads(folder.read("summary.json"))
    found: dict[str, Any] = {key: summary[key] for key in ("final", "best", "communication")}
    found |= {"sha256": summary["adapter_sha256"], "adapter": folder.read("adapter/fake.json")}
    for name in (*TABLES, "partition.parquet"):
        table = pq.read_table(folder.local / name)
        drop = [column for column in table.column_names if column == "seconds"]
        found[name] = table.drop_columns(drop).to_pylist()
    # The others are about the damage.
    notes = found["notes.parquet"]
    found["notes.parquet"] = [row for row in notes if row["text"].startswith("client ")]
    return found


@cache
def undamaged() -> dict[str, Any]:
    with TemporaryDirectory() as path:
        return outcome(unpacked(files_of(None), path))


def same(found: Any, expected: Any) -> bool:
    return repr(found) == repr(expected)  # equal bits; nan is nan


def check_resumed(files: dict[str, bytes], name: str, content: bytes | None) -> None:
    """Resume a run with one file replaced or deleted: nothing changes, or the file is named."""
    with TemporaryDirectory() as path:
        folder = unpacked(files, path)
        replace_file(folder, name, content)
        try:
            go_on(folder)
        except RunFolderError as error:
            assert name in str(error)
            assert name not in REMADE
        else:
            assert same(outcome(folder), undamaged())


def replace_file(folder: RunFolder, name: str, content: bytes | None) -> None:
    if content is None:
        folder.remove(name)
    else:
        folder.write(name, content)


@QUICK
@given(data=st.data(), name=st.sampled_from(KEPT))
def test_an_unfinished_run_with_a_damaged_file_ends_as_an_undamaged_one_or_names_it(
    data: st.DataObject, name: str
) -> None:
    files = files_of(3)
    check_resumed(files, name, data.draw(damage(files[name])))


@pytest.mark.parametrize("name", TABLES)
def test_every_flipped_bit_of_a_table_is_noticed(name: str, tmp_path: Path) -> None:
    files = files_of(3)
    folder = unpacked(files, tmp_path)
    content = files[name]
    assert seals.check(folder, name) is None
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(bytes(flipped))
        assert f"{name} is damaged" in (seals.check(folder, name) or "")
    with pytest.raises(RunFolderError, match=f"{name} is damaged"):
        read_run(folder)


@pytest.mark.parametrize("name", KEPT)
def test_a_deleted_or_cut_file_of_an_unfinished_run_is_written_again_or_named(name: str) -> None:
    files = files_of(3)
    for content in (None, b"", files[name][: len(files[name]) // 2], files[name][:-1]):
        if name == "recipe.yaml" and content is None:
            continue  # a folder without a recipe is no run
        check_resumed(files, name, content)


@QUICK
@given(data=st.data(), name=st.sampled_from([*LISTED, "SHA256SUMS"]))
def test_a_finished_run_with_a_damaged_file_is_made_whole_or_names_it(
    data: st.DataObject, name: str
) -> None:
    files = files_of(None)
    check_resumed(files, name, data.draw(st.one_of(st.none(), damage(files[name]))))


@pytest.mark.parametrize("name", TABLES)
def test_an_older_copy_of_a_table_is_known_as_one(name: str, tmp_path: Path) -> None:
    folder = unpacked({**files_of(3), name: files_of(2)[name]}, tmp_path)
    with pytest.raises(RunFolderError, match=f"{name} is damaged: it has"):
        go_on(folder)
    with pytest.raises(RunFolderError, match=f"{name} is damaged: it has"):
        read_run(folder)


def reading(name: str, folder: RunFolder, to: Path) -> Sequence[Callable[[], Any]]:
    """Return the readers of a file of a finished run."""
    read: list[Callable[[], Any]] = []
    if not name.startswith("adapter"):
        read.append(lambda: read_run(folder))
    if name in ("rounds.parquet", "clients.parquet"):
        read.append(lambda: getattr(Result(folder.location, {}), name.partition(".")[0]))
    if name in ("summary.json", "adapter/fake.json", "SHA256SUMS"):
        read.append(lambda: [*export_run(folder.location, to, merge=False)])
    return read


@pytest.mark.parametrize("name", [*LISTED, "SHA256SUMS"])
def test_whatever_reads_a_finished_run_rejects_damage_by_the_files_name(
    name: str, tmp_path: Path
) -> None:
    files = files_of(None)
    middle = len(files[name]) // 2
    flipped = files[name][:middle] + bytes([files[name][middle] ^ 4]) + files[name][middle + 1 :]
    for i, content in enumerate((flipped, files[name][:-1], None)):
        folder = unpacked(files, tmp_path / str(i))
        for read in reading(name, folder, tmp_path / f"whole-{i}"):
            read()
        replace_file(folder, name, content)
        if name == "recipe.yaml" and content is None:
            continue
        if name == "summary.json" and content is None:
            # As a kill between list and summary leaves it.
            assert complete(folder, RECIPE) is None
            continue
        for read in reading(name, folder, tmp_path / f"to-{i}"):
            with pytest.raises(RunFolderError, match=f"{name} is damaged"):
                read()
        assert not (tmp_path / f"to-{i}").exists()
        # `run --resume` alone can write some files again.
        if name in REMADE:
            assert complete(folder, RECIPE) is None
        else:
            with pytest.raises(RunFolderError, match=f"{name} is damaged"):
                complete(folder, RECIPE)


def test_a_finished_run_says_what_it_wrote_again(tmp_path: Path) -> None:
    folder = unpacked(files_of(None), tmp_path)
    folder.write("adapter/fake.json", b"{}")
    _, notes = go_on(folder)
    assert any("adapter/fake.json is damaged or missing" in note for note in notes)
    assert same(outcome(folder), undamaged())
    assert checksums.faults(folder) == {}


def test_without_checkpoints_a_damaged_summary_is_not_replaced_by_a_new_run(
    tmp_path: Path,
) -> None:
    folder = unpacked(files_of(None), tmp_path)
    folder.write("summary.json", b"{}")
    folder.remove("checkpoints")
    with pytest.raises(RunFolderError, match=r"summary\.json is damaged: .*; restore it from"):
        go_on(folder)


def test_a_run_killed_in_its_first_save_is_said_to_begin_anew(tmp_path: Path) -> None:
    files = {name: content for name, content in files_of(3).items() if "/" not in name}
    folder = unpacked(files, tmp_path)
    folder.remove("clients.parquet")
    with pytest.raises(RunFolderError, match=r"clients\.parquet is damaged: .* begins anew"):
        read_run(folder)
    go_on(folder)
    assert same(outcome(folder), undamaged())


def test_a_recipe_with_a_comment_of_the_users_own_is_read_as_it_is(tmp_path: Path) -> None:
    folder = unpacked(files_of(3), tmp_path)
    text = seals.text(folder, "recipe.yaml")
    folder.write("recipe.yaml", f"# from the paper\n{text}".encode())
    assert kept_recipe(folder) == RECIPE


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_the_list_of_a_finished_run(tmp_path: Path) -> None:
    unpacked(files_of(None), tmp_path)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    names = (*LISTED, *(f"adapter/{name}" for name in BESIDE))
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: OK" for name in names)


@pytest.mark.parametrize("killed_at", range(12))
def test_a_run_killed_between_any_two_writes_is_not_taken_for_damage(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpacked(files_of(3), tmp_path)

    class Killed(BaseException):
        """Stands for SIGKILL."""

    writes, opened = 0, RunFolder.open_to_write

    def dying(self: RunFolder, name: str) -> Any:
        nonlocal writes
        writes += 1
        if writes > killed_at:
            raise Killed
        return opened(self, name)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "open_to_write", dying)
        go_on(folder, 5)
    read_run(folder)
    go_on(folder)
    assert same(outcome(folder), undamaged())


def test_a_newer_damaged_checkpoint_leaves_its_tables_to_the_older_one(tmp_path: Path) -> None:
    folder = unpacked(files_of(3), tmp_path)
    folder.write("checkpoints/round-000003/state.safetensors", b"")
    go_on(folder)
    assert same(outcome(folder), undamaged())


def test_tables_cut_back_to_an_older_checkpoint_are_not_taken_for_damage(tmp_path: Path) -> None:
    folder = unpacked(files_of(3), tmp_path)
    folder.write("checkpoints/round-000003/state.safetensors", b"")
    recipe, board = RECIPE, StatusBoard(6)

    class Killed(BaseException):
        """Stands for SIGKILL, before another round is saved."""

    def stop() -> bool:
        raise Killed

    going = simulate_rounds(recipe, local_engine(recipe, FAILING), folder, board, stop, resume=True)
    with pytest.raises(Killed):
        next(going)
    rows = pq.read_metadata(tmp_path / "clients.parquet").num_rows
    assert rows < len(pd.read_parquet(BytesIO(files_of(3)["clients.parquet"])))
    assert read_run(folder).failed > 0
    go_on(folder)
    assert same(outcome(folder), undamaged())


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_run_read_between_the_writes_of_list_and_summary_is_an_unfinished_one(
    withdrawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpacked(files_of(None), tmp_path / "run")
    if withdrawn:
        seen: list[Any] = []
        remove = RunFolder.remove

        def looked(self: RunFolder, name: str) -> None:
            remove(self, name)
            seen.append(read_run(RunFolder(folder.location)).summary)

        monkeypatch.setattr(RunFolder, "remove", looked)
        checksums.withdraw(folder)
        assert seen == [None, None]
    else:
        folder.remove("summary.json")
        assert read_run(folder).summary is None
    with pytest.raises(RunFolderError, match="expected the folder of a finished run"):
        list(export_run(folder.location, tmp_path / "to", merge=False))


def as_older_versions_wrote(folder: RunFolder) -> None:
    """Take all checksums away."""
    for name in (*TABLES, "partition.parquet"):
        table = pq.read_table(folder.local / name)
        pq.write_table(table, folder.local / name)
    folder.write("recipe.yaml", seals.text(folder, "recipe.yaml").encode())
    folder.remove("SHA256SUMS")
    folder.remove("checkpoints")
    summary = json.loads(folder.read("summary.json"))
    del summary["checksums"]
    folder.write("summary.json", json.dumps(summary).encode())


def test_a_finished_run_of_an_older_version_is_read_as_it_is(tmp_path: Path) -> None:
    folder = unpacked(files_of(None), tmp_path / "run")
    as_older_versions_wrote(folder)
    assert complete(folder, RECIPE) is not None
    assert "clients.parquet" in read_run(folder).notes["text"][0]
    lines = [*export_run(folder.location, tmp_path / "to", merge=False)]
    assert "older version" in lines[0]


def test_the_tables_of_a_run_have_rows_to_lose() -> None:
    """Keep the tests above from passing for want of rows."""
    with TemporaryDirectory() as path:
        folder = unpacked(files_of(3), path)
        for name in (*TABLES, "partition.parquet"):
            assert len(pd.read_parquet(folder.local / name)) >= 3, name


def test_a_tracked_runs_id_with_another_character_is_not_taken_for_another_run(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    trackers._store_run_id(folder, "mlflow", "abc123")
    trackers._store_run_id(folder, "wandb", "x")
    assert trackers._run_ids(folder) == {"mlflow": "abc123", "wandb": "x"}
    folder.write("tracking.json", folder.read("tracking.json").replace(b"abc123", b"abc124"))
    with pytest.raises(RunFolderError, match=r"tracking\.json is damaged"):
        trackers._run_ids(folder)
    folder.write("tracking.json", b'{"wandb": "without a checksum"}')
    with pytest.raises(RunFolderError, match=r"tracking\.json is damaged"):
        trackers._run_ids(folder)
