"""A resume that is rejected leaves the run folder as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rayfed_lora
from rayfed_lora.errors import RunFolderError
from rayfed_lora.runs import checksums, restored
from rayfed_lora.storage import RunFolder
from tests.fakes import FakeFactory, make_recipe


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(folder: Path, **more: Any) -> Any:
    recipe = make_recipe(storage__keep=2)
    return rayfed_lora.run(recipe, str(folder), factory=FakeFactory(), **more)


def of_other_data(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(restored, "changed_data", lambda snapshot, population: "other data")
    return "other data; start anew with another --out"


def of_another_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    def refuse(*args: Any) -> None:
        raise ValueError("other shapes")

    monkeypatch.setattr(restored, "check", refuse)
    return "ValueError: other shapes"


def without_a_whole_checkpoint(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    states = [*folder.glob("checkpoints/round-*/state.safetensors")]
    assert len(states) == 2
    for path in states:
        path.write_bytes(path.read_bytes()[:-1])
    return "every checkpoint in .* is damaged"


@pytest.mark.parametrize("damaged", ["adapter/fake.json", "partition.parquet", "summary.json"])
@pytest.mark.parametrize("why", [of_other_data, of_another_model, without_a_whole_checkpoint])
def test_a_rejected_resume_of_a_finished_run_changes_no_file(
    damaged: str,
    why: Callable[[pytest.MonkeyPatch, Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(tmp_path)
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes() + b" ")
    reason = why(monkeypatch, tmp_path)
    before = files(tmp_path)
    assert {"summary.json", "SHA256SUMS", "partition.parquet"} <= before.keys()
    with pytest.raises(RunFolderError, match=reason):
        run(tmp_path, resume=True)
    assert files(tmp_path) == before


def test_changed_data_are_rejected_before_tensorboards_events_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trackers begin once the resume is accepted.
    run(tmp_path)
    (tmp_path / "adapter" / "fake.json").write_bytes(b"")
    reason = of_other_data(monkeypatch, tmp_path)
    began: list[str] = []
    monkeypatch.setattr(
        "rayfed_lora.runs.session.trackers", lambda *args: began.append("tracker") or iter(())
    )
    with pytest.raises(RunFolderError, match=reason):
        run(tmp_path, resume=True)
    assert began == []
    monkeypatch.undo()
    run(tmp_path, resume=True)
    assert (tmp_path / "adapter" / "fake.json").read_bytes() != b""


def test_a_resume_reads_the_files_of_a_damaged_run_before_and_under_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    (tmp_path / "adapter" / "fake.json").write_bytes(b"")
    real, looks = checksums.faults, []

    def counted(folder: RunFolder) -> dict[str, str]:
        looks.append(sorted(tmp_path.glob(".owner-*")) != [])
        return real(folder)

    monkeypatch.setattr(checksums, "faults", counted)
    run(tmp_path, resume=True)
    assert looks == [False, True]
