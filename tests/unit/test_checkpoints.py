"""Checkpoints: exact to the bit, and what happens to those that are not whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.runs import checkpoints
from rayfed_lora.runs.checkpoints import Snapshot
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import AdapterState, Base, Factors


def save_checkpoint(folder, taken, keep):
    checkpoints.CheckpointWriter(folder, keep).write(taken)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def factors(seed: int, rank: int) -> Factors:
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(rank, 4)).astype(np.float32)
    b = draw.normal(size=(6, rank)).astype(np.float32)
    return Factors(a, b, 1 / 3 + seed)


def snapshot(rounds: int, base: Base | None = None) -> Snapshot:
    """A state with a module of rank 0, names not in sorted order and values hard to keep."""
    odd = np.array([-0.0, 1e-45, np.nan, np.inf, 1 / 3], np.float32)
    return Snapshot(
        rounds=rounds,
        state=AdapterState(
            {"v": factors(rounds, 2), "q": factors(rounds + 1, 0)},
            {"head.weight": np.asfortranarray(np.eye(3, 2, dtype=np.float32)), "a.bias": odd},
        ),
        base=base or Base(),
        held={"base": np.array([-1, 0, 2**40], np.int64), "a": np.array([3], np.int64)},
        facts={"rank": 2, "timing": {"wall_s": 0.1}, "validation": None},
    )


def replaced(root: int) -> Base:
    tensors = {"z.weight": np.full((2, 3), root / 7, np.float32), "b": np.zeros(0, np.float32)}
    merged = {"v": np.full((6, 4), 1 / 3, np.float32), "q": np.zeros((1, 1), np.float32)}
    return Base(root, tensors, 5, merged)


def never_warned(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def read_back(folder: RunFolder) -> Snapshot:
    found = checkpoints.newest(folder, never_warned)
    assert found is not None
    return found


def assert_same_bits(found: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> None:
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in kept.items()}
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype
        assert np.ascontiguousarray(found[name]).tobytes() == tensor.tobytes()


def assert_same_factors(found: Mapping[str, Factors], kept: Mapping[str, Factors]) -> None:
    assert list(found) == list(kept)
    for name, f in kept.items():
        assert found[name].scale == f.scale
        assert_same_bits({"a": found[name].a, "b": found[name].b}, {"a": f.a, "b": f.b})


def test_a_state_comes_back_bit_for_bit_in_the_same_order(folder):
    kept = snapshot(3)
    save_checkpoint(folder, kept, keep=2)
    found = read_back(folder)
    assert found.rounds == 3
    assert_same_factors(found.state.factors, kept.state.factors)
    assert list(found.state.dense) == ["head.weight", "a.bias"]
    assert_same_bits(found.state.dense, kept.state.dense)
    assert {kind: held.tolist() for kind, held in found.held.items()} == {
        "base": [-1, 0, 2**40],
        "a": [3],
    }
    assert (found.moments, found.personal) == ({}, {})
    assert {key: found.facts[key] for key in kept.facts} == kept.facts
    assert found.base == Base(0, None, 0, {})


def test_a_replaced_base_and_what_was_merged_into_it_come_back_bit_for_bit(folder):
    kept = replaced(2)
    save_checkpoint(folder, snapshot(1, kept), keep=2)
    found = read_back(folder).base
    assert found.root == 2
    assert found.tensors is not None and kept.tensors is not None
    assert_same_bits(found.tensors, kept.tensors)
    assert found.version == kept.version == (2, 5)
    assert_same_bits(found.merged, kept.merged)


def test_moments_and_each_clients_own_factors_come_back_bit_for_bit(folder):
    draw = np.random.default_rng(0)
    moments = {
        f"A of m.{i}|x": (draw.normal(size=(2, 3)), draw.normal(size=(2, 3))) for i in (1, 2)
    }
    personal = {
        client: {
            "q": draw.normal(size=(6, 2)).astype(np.float32),
            "v": np.asfortranarray(np.eye(2)),
        }
        for client in (0, 17, 10**6)
    }
    kept = replace(snapshot(3), moments=moments, personal=personal)
    save_checkpoint(folder, kept, keep=1)
    found = read_back(folder)
    assert found.moments.keys() == moments.keys()
    for name, parts in moments.items():
        for got, expected in zip(found.moments[name], parts, strict=True):
            assert got.tobytes() == expected.tobytes()
    assert found.personal.keys() == personal.keys()
    for client, factors_b in personal.items():
        assert_same_bits(found.personal[client], factors_b)


def test_a_full_model_state_without_factors_comes_back(folder):
    kept = Snapshot(
        1,
        AdapterState({}, {"w": np.ones(2, np.float32)}),
        Base(),
        {"base": np.zeros(1, np.int64)},
        {},
    )
    save_checkpoint(folder, kept, keep=1)
    found = read_back(folder)
    assert found.state.factors == {}
    assert_same_bits(found.state.dense, kept.state.dense)


def test_only_the_newest_are_kept_and_the_newest_is_read(folder):
    for rounds in (1, 2, 9, 10, 11):
        save_checkpoint(folder, snapshot(rounds), keep=2)
    assert folder.names("checkpoints") == ["round-000010", "round-000011"]
    assert read_back(folder).rounds == 11


def test_a_replaced_base_is_written_once_and_removed_when_no_checkpoint_needs_it(folder):
    writer = checkpoints.CheckpointWriter(folder, keep=2)
    writer.write(snapshot(1, replaced(1)))
    first = (Path(folder.location) / "checkpoints" / "base-000001.safetensors").stat()
    writer.write(snapshot(2, replaced(1)))
    again = (Path(folder.location) / "checkpoints" / "base-000001.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    writer.write(snapshot(3, replaced(2)))
    assert folder.exists("checkpoints/base-000001.safetensors")
    writer.write(snapshot(4, replaced(2)))
    assert folder.names("checkpoints") == [
        "base-000002.safetensors",
        "round-000003",
        "round-000004",
    ]


def test_writing_the_same_round_again_replaces_it(folder):
    save_checkpoint(folder, snapshot(5), keep=2)
    second = Snapshot(5, *[getattr(snapshot(6), name) for name in ("state", "base", "held")], {})
    save_checkpoint(folder, second, keep=2)
    assert_same_factors(read_back(folder).state.factors, snapshot(6).state.factors)


def test_a_folder_without_checkpoints_has_none(folder):
    assert checkpoints.newest(folder, never_warned) is None


def damage(folder: RunFolder, name: str, how: str) -> None:
    content = folder.read(name)
    if how == "gone":
        folder.remove(name)
    elif how == "truncated":
        folder.write(name, content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        folder.write(name, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        folder.write(name, b"")


@pytest.mark.parametrize("how", ["gone", "truncated", "flipped", "empty"])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_is_used(folder, file, how):
    save_checkpoint(folder, snapshot(4), keep=2)
    save_checkpoint(folder, snapshot(5), keep=2)
    damage(folder, f"checkpoints/round-000005/{file}", how)
    notes: list[str] = []
    found = checkpoints.newest(folder, notes.append)
    assert found is not None
    assert found.rounds == 4
    assert_same_factors(found.state.factors, snapshot(4).state.factors)
    (note,) = notes
    assert "round-000005 is damaged or half written" in note


@pytest.mark.parametrize("how", ["gone", "truncated", "empty"])
def test_a_damaged_manifest_is_noticed_and_the_checkpoint_before_is_used(folder, how):
    save_checkpoint(folder, snapshot(4), keep=2)
    save_checkpoint(folder, snapshot(5), keep=2)
    damage(folder, "checkpoints/round-000005/manifest.json", how)
    notes: list[str] = []
    found = checkpoints.newest(folder, notes.append)
    assert found is not None
    assert (found.rounds, len(notes)) == (4, 1)


@pytest.mark.parametrize("how", ["gone", "truncated", "flipped"])
def test_a_damaged_base_is_noticed_and_the_checkpoint_before_is_used(folder, how):
    save_checkpoint(folder, snapshot(4), keep=2)
    save_checkpoint(folder, snapshot(5, replaced(1)), keep=2)
    damage(folder, "checkpoints/base-000001.safetensors", how)
    notes: list[str] = []
    found = checkpoints.newest(folder, notes.append)
    assert found is not None
    assert (found.rounds, len(notes)) == (4, 1)


def test_a_checkpoint_of_another_format_is_passed_over(folder):
    save_checkpoint(folder, snapshot(4), keep=2)
    name = "checkpoints/round-000004/manifest.json"
    folder.write(name, folder.read(name).replace(b'"format": 3', b'"format": 1'))
    notes: list[str] = []
    with pytest.raises(RunFolderError, match="format 1, this version reads 3"):
        checkpoints.newest(folder, notes.append)
    assert "format 1, this version reads 3" in notes[0]


def test_checkpoints_that_are_all_damaged_are_an_error_that_names_the_folder(folder):
    for rounds in (4, 5):
        save_checkpoint(folder, snapshot(rounds), keep=2)
        damage(folder, f"checkpoints/round-00000{rounds}/state.json", "flipped")
    notes: list[str] = []
    fault = r"every checkpoint in .*/checkpoints is damaged.*\(round-000005: "
    with pytest.raises(RunFolderError, match=fault):
        checkpoints.newest(folder, notes.append)
    assert len(notes) == 2


def test_a_first_checkpoint_that_was_never_finished_counts_as_none(folder):
    save_checkpoint(folder, snapshot(1), keep=2)
    folder.remove("checkpoints/round-000001/manifest.json")
    notes: list[str] = []
    assert checkpoints.newest(folder, notes.append) is None
    assert len(notes) == 1


def test_a_full_disk_while_writing_leaves_the_older_checkpoint_in_use(folder, monkeypatch):
    save_checkpoint(folder, snapshot(4), keep=1)
    write = RunFolder.write

    def full_at_the_manifest(self: RunFolder, name: str, content: bytes) -> None:
        if name.endswith("manifest.json"):
            raise RunError("cannot write: No space left on device")
        write(self, name, content)

    monkeypatch.setattr(RunFolder, "write", full_at_the_manifest)
    with pytest.raises(RunError, match="No space left"):
        save_checkpoint(folder, snapshot(5), keep=1)
    notes: list[str] = []
    found = checkpoints.newest(folder, notes.append)
    assert found is not None
    assert (found.rounds, len(notes)) == (4, 1)


def test_the_checkpoint_just_written_is_kept_though_damaged_newer_ones_lie_there(folder):
    # Rounds 4 and 5 are damaged, so the run goes on from 3 and writes 4 again.
    for rounds in (3, 4, 5):
        save_checkpoint(folder, snapshot(rounds), keep=3)
    for rounds in (4, 5):
        damage(folder, f"checkpoints/round-00000{rounds}/state.json", "flipped")
    save_checkpoint(folder, snapshot(4), keep=1)
    found = checkpoints.newest(folder, lambda text: None)
    assert found is not None
    assert found.rounds == 4


def test_a_damaged_base_is_written_anew_when_its_round_is_run_again(folder):
    save_checkpoint(folder, snapshot(4), keep=2)
    save_checkpoint(folder, snapshot(5, replaced(1)), keep=2)
    damage(folder, "checkpoints/base-000001.safetensors", "flipped")
    # The run goes on from 4, and reaches 5 again.
    save_checkpoint(folder, snapshot(5, replaced(1)), keep=2)
    assert read_back(folder).rounds == 5
