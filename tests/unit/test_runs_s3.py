"""Runs, comparisons, reports and exports in an object store."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.launching.compare import compare
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.claiming import claim
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from tests.fakes import (
    RECIPE,
    FakeFactory,
    FakeTrainer,
    Killed,
    KilledEngine,
    local_engine,
    make_recipe,
)


def run(
    recipe: Recipe, location: str, executor: Any = None, resume: bool = False
) -> dict[str, Any]:
    folder = RunFolder(location)
    claim(folder, recipe, resume)
    board = StatusBoard(recipe.annealing.total_rounds)
    executor = executor or local_engine(recipe)
    return simulate(recipe, executor, folder, board, lambda: False, resume=resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a local folder that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    run(make_recipe(), str(out))
    return out


def assert_same_run(folder: RunFolder, expected: Path) -> None:
    got, wanted = (json.loads(f.read("summary.json")) for f in (folder, RunFolder(expected)))
    for key in ("adapter_sha256", "communication", "final", "best", "rounds"):
        assert got[key] == wanted[key]
    for name in ("rounds.parquet", "clients.parquet"):
        found = pd.read_parquet(BytesIO(folder.read(name))).drop(columns="seconds")
        kept = pd.read_parquet(expected / name).drop(columns="seconds")
        pd.testing.assert_frame_equal(found, kept, check_exact=True)
    assert folder.read("adapter/fake.json") == (expected / "adapter/fake.json").read_bytes()


def test_a_run_killed_in_an_object_store_goes_on_and_ends_as_one_in_a_local_folder(bucket, whole):
    recipe, location = make_recipe(), bucket.uri("runs/a")
    for round_index, resume in ((2, False), (4, True)):
        with pytest.raises(Killed):
            run(recipe, location, KilledEngine(recipe, round_index, 1), resume)
    run(recipe, location, resume=True)
    folder = RunFolder(location)
    assert folder.names("checkpoints")[1:] == ["round-000005", "round-000006"]
    assert_same_run(folder, whole)


def test_a_run_whose_checkpoint_cannot_be_sent_ends_and_goes_on(object_store, bucket, whole):
    recipe, location = make_recipe(), bucket.uri("runs/a")
    with (
        object_store.refusing(lambda method, url: method == "PUT" and "round-000003/state" in url),
        pytest.raises(RunError, match=r"cannot write .*round-000003/state"),
    ):
        run(recipe, location)
    run(recipe, location, resume=True)
    assert_same_run(RunFolder(location), whole)


def test_a_folder_with_a_run_or_other_files_is_refused(bucket):
    run(make_recipe(), bucket.uri("runs/a"))
    with pytest.raises(RunFolderError, match="holds a run already"):
        claim(RunFolder(bucket.uri("runs/a")), make_recipe(), resume=False)
    RunFolder(bucket.uri("theses")).write("thesis.tex", b"do not touch")
    with pytest.raises(RunFolderError, match="other files in it"):
        claim(RunFolder(bucket.uri("theses")), make_recipe(), resume=True)
    assert "theses/thesis.tex" in bucket.keys("theses")


def test_the_python_interface_runs_reports_and_reads_tables(bucket):
    location = bucket.uri("runs/a")
    result = rayfed_lora.run(make_recipe(), location, factory=FakeFactory())
    assert len(result.rounds) == 6
    again = rayfed_lora.run(make_recipe(), location, resume=True, factory=FakeFactory())
    assert again.summary == result.summary
    assert rayfed_lora.report([location]) == bucket.uri("runs/a/report.html")
    assert rayfed_lora.report([location], bucket.uri("elsewhere/r.html"))
    assert b"fake" in RunFolder(bucket.uri("elsewhere")).read("r.html")


@pytest.mark.e2e
def test_a_comparison_is_written_goes_on_and_is_reported(bucket):
    out, methods = bucket.uri("comparisons/c"), ["sa-fedlora", "fedavg"]
    first = compare(RECIPE, methods, out, factory=FakeFactory())
    columns = ["method", "seed", "final_accuracy", "total_bytes", "adapter_sha256"]
    assert first.runs["location"][0] == bucket.uri("comparisons/c/sa-fedlora/seed-0")
    folder = RunFolder(out)
    folder.remove("fedavg/seed-0/summary.json")
    again = compare(RECIPE, methods, out, factory=FakeFactory())
    pd.testing.assert_frame_equal(again.runs[columns], first.runs[columns])
    assert {"runs.parquet", "runs.csv", "methods.csv", "plots", "report.html"} <= {*folder.names()}
    folder.remove("report.html")
    assert rayfed_lora.report([out]) == bucket.uri("comparisons/c/report.html")
    assert b"2 runs" in folder.read("report.html")


def test_an_adapter_is_exported_to_a_local_folder(bucket, tmp_path):
    run(make_recipe(), bucket.uri("runs/a"))
    lines = list(export_run(bucket.uri("runs/a"), tmp_path / "out", merge=False))
    assert lines == [f"adapter: {tmp_path / 'out'}"]
    assert (tmp_path / "out" / "fake.json").exists()


def test_what_is_not_a_finished_run_is_not_exported(bucket, tmp_path):
    with pytest.raises(RunFolderError, match="a finished run"):
        list(export_run(bucket.uri("runs/none"), tmp_path / "out", merge=False))
    folder = RunFolder(bucket.uri("runs/a"))
    run(make_recipe(), folder.location)
    folder.write("summary.json", b"{")
    with pytest.raises(RunFolderError, match=r"summary\.json.* is damaged"):
        list(export_run(folder.location, tmp_path / "out", merge=True))


@pytest.mark.parametrize("files", [{"../../escaped": b"x"}, {"/tmp/escaped": b"x"}])
def test_an_export_cannot_write_outside_the_run_folder(tmp_path, files, monkeypatch):
    recipe = make_recipe()
    engine = local_engine(recipe)
    monkeypatch.setattr(FakeTrainer, "_export", lambda *args: files)
    with pytest.raises(RunFolderError, match="expected a name inside the folder"):
        run(recipe, str(tmp_path / "deep" / "run"), engine)
    assert not list(tmp_path.rglob("escaped"))
