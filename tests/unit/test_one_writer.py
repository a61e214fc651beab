"""Two commands on one run folder: exactly one of them runs, and nothing is mixed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.errors import DataError, RunError, RunFolderError
from rayfed_lora.launching.compare import compare
from rayfed_lora.runs import location, ownership
from rayfed_lora.runs.leases.record import Process, this_process
from rayfed_lora.runs.ownership import Pace, Ticket, take
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.storage import RunFolder
from tests.fakes import RECIPE, Behaviour, FakeFactory, local_engine, make_recipe

SLOW = FakeFactory(Behaviour(sleep_s=dict.fromkeys(range(6), 0.05)))
# Six rounds of three clients each.
ROUNDS, CLIENT_ROWS = 6, 18


class Faulty(FakeFactory):
    """Has no data."""

    def workload(self, recipe: Any) -> Any:
        raise DataError("no data")


@pytest.fixture(params=["mounted", pytest.param("s3", marks=pytest.mark.e2e)])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "mounted":
        return str(tmp_path / "run")
    return str(request.getfixturevalue("bucket").uri("runs/a"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "PACE", Pace(renew_s=0.1, stale_s=1.0))


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live owner is seen to be one before its run is over."""
    monkeypatch.setattr(ownership, "PACE", Pace(renew_s=0.1, stale_s=60.0))


def rows(out: str) -> tuple[int, int]:
    folder = RunFolder(out)
    names = ("rounds.parquet", "clients.parquet")
    first, second = (len(pd.read_parquet(BytesIO(folder.read(name)))) for name in names)
    return first, second


def lease_files(out: str) -> list[str]:
    return [name for name in RunFolder(out).names() if name.startswith(".")]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls at once, each in a thread; return results or what was raised."""
    found: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def call(i: int) -> None:
        barrier.wait(30)
        try:
            found[i] = calls[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def run(out: str, **more: Any) -> Any:
    return rayfed_lora.run(make_recipe(), out, factory=SLOW, **more)


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_started_together_one_runs_and_the_other_is_told_who(out, resume, brisk):
    if resume:  # what is resumed has a folder
        filesystem, path = RunFolder(out).place
        filesystem.create_dir(path)
    found = together(*[lambda: run(out, resume=resume)] * 2)
    errors = [each for each in found if isinstance(each, Exception)]
    assert len(errors) == 1
    assert isinstance(errors[0], RunFolderError)
    assert "owned by" in str(errors[0])
    assert rows(out) == (ROUNDS, CLIENT_ROWS)
    assert lease_files(out) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_beside_a_live_one_is_refused_and_told_who_and_the_first_one_is_whole(
    out, resume, brisk, capsys
):
    refused: list[str] = []

    def watch(status: Status) -> None:
        if status.rounds_done == 2 and not refused:
            with pytest.raises(RunFolderError, match=f"owned by {this_process_text()}") as error:
                run(out, resume=resume)
            refused.append(str(error.value))

    assert rayfed_lora.run(make_recipe(), out, factory=SLOW, watch=watch).summary["rounds"] == 6
    assert len(refused) == 1
    assert rows(out) == (ROUNDS, CLIENT_ROWS)
    assert ("waiting up to" in capsys.readouterr().err) == resume


def this_process_text() -> str:
    process = this_process()
    return f"process {process.pid} on host {process.host} since"


def test_a_run_that_comes_after_the_first_one_has_ended_is_refused_though_it_had_looked_before(
    tmp_path, monkeypatch
):
    out = str(tmp_path / "run")
    real = rayfed_lora.launching.launch.claimed

    def late(*args: Any) -> Any:
        # What a command that had seen an empty folder may find by the time that it takes it.
        monkeypatch.undo()
        run(out)
        return real(*args)

    monkeypatch.setattr("rayfed_lora.launching.launch.claimed", late)
    with pytest.raises(RunFolderError, match="holds a run already"):
        run(out)
    assert rows(out) == (ROUNDS, CLIENT_ROWS)


def test_a_resumed_run_takes_the_folder_of_a_silent_machine_and_says_that_it_waits(
    out, quick, capsys
):
    def stop(status: Status) -> None:
        if status.rounds_done == 3:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        rayfed_lora.run(make_recipe(), out, factory=SLOW, watch=stop)
    elsewhere = Process("far-away", "another boot", 4711, 17)
    record = ownership.Record("token", "its run", elsewhere, None, "2026-01-01 10:00:00")
    assert ownership.lease_files(RunFolder(out)).create(1, record.content())
    with pytest.raises(RunFolderError, match="owned by process 4711 on host far-away"):
        run(out)
    assert run(out, resume=True).summary["rounds"] == 6
    assert "owned by process 4711 on host far-away since 2026" in capsys.readouterr().err
    assert rows(out) == (ROUNDS, CLIENT_ROWS)
    assert lease_files(out) == []


def test_a_run_that_has_lost_its_folder_ends_and_changes_nothing_any_more(out):
    recipe, folder, ticket = make_recipe(), RunFolder(out), Ticket("a run")
    before: dict[str, bytes] = {}

    def files() -> dict[str, bytes]:
        names = [name for name in folder.names() if name.endswith((".parquet", ".json", ".yaml"))]
        return {name: folder.read(name) for name in names if not name.startswith(".")}

    def watch(status: Status) -> None:
        if status.running == 4 and not before:
            take(folder, ticket).keep()
            before.update(files())
            if folder.local is None:
                # On remote storage the lease is looked at once a second.
                threading.Event().wait(1.2)

    board = StatusBoard(recipe.annealing.total_rounds, watch)
    with pytest.raises(RunError, match=r"has lost it to process .*; nothing more is saved"):
        simulate(
            recipe,
            local_engine(recipe),
            folder,
            board,
            lambda: False,
            resume=False,
            ticket=ticket,
        )
    assert files() == before
    assert {"rounds.parquet", "recipe.yaml"} <= before.keys()
    assert not folder.exists("summary.json")


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(DataError):
        rayfed_lora.run(make_recipe(), str(tmp_path / "a" / "b"), factory=Faulty())
    assert [*tmp_path.iterdir()] == []


def test_new_folders_of_one_second_differ_and_sort_by_time(monkeypatch):
    monkeypatch.setattr(location.time, "strftime", lambda text: "20260101-100000")
    first, second = (location.run_location(None, "a-run") for _ in range(2))
    assert first != second
    assert first.startswith("runs/a-run-20260101-100000-")


def test_of_two_comparisons_of_one_folder_one_runs(tmp_path):
    out = str(tmp_path / "all")

    def start() -> Any:
        return compare(RECIPE, ["sa-fedlora", "fedavg"], out, factory=SLOW)

    found = together(start, start)
    (error,) = (each for each in found if isinstance(each, Exception))
    assert isinstance(error, RunFolderError)
    (done,) = (each for each in found if not isinstance(each, Exception))
    assert done.runs["error"].isna().all()
    assert rows(f"{out}/sa-fedlora/seed-0") == (ROUNDS, CLIENT_ROWS)
    assert lease_files(out) == lease_files(f"{out}/fedavg/seed-0") == []


def test_a_run_of_a_comparison_that_somebody_else_goes_on_with_fails_alone(tmp_path, quick):
    other = take(RunFolder(tmp_path / "all" / "fedavg" / "seed-0"), pace=Pace(0.05, 60.0))
    try:
        done = compare(RECIPE, ["sa-fedlora", "fedavg"], str(tmp_path / "all"), factory=SLOW)
    finally:
        other.release()
    (failed,) = done.runs["error"].dropna()
    assert "owned by" in failed


def test_a_trials_ticket_is_its_own():
    from rayfed_lora.tuning.trial import Trial

    trials = []
    for name in ("one", "other"):
        trial = object.__new__(Trial)
        search = type("Search", (), {"ticket": Ticket("search", this_process())})()
        trial._search, trial._trial_info = search, type("Info", (), {"trial_id": name})()
        trials.append(trial._ticket)
    assert trials == [
        replace(Ticket("search x", this_process()), run=f"search {n}") for n in ("one", "other")
    ]
