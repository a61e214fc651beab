"""Who is told of a run beside its own tables: event files, failures that do not cost the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayfed_lora.errors import BadInputError, InterruptedRunError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.checked import table
from rayfed_lora.runs.claiming import claim
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.trackers import TensorBoard, check_tracking
from rayfed_lora.storage import RunFolder
from tests.fakes import local_engine, make_recipe


class Told:
    """Keeps what it is told; fails in one round."""

    def __init__(self, failing: int | None = None) -> None:
        self.news: list[tuple[Any, ...]] = []
        self._failing = failing

    def resumed(self, rounds: Any) -> None:
        self.news.append(("resumed", rounds.num_rows))

    def round_done(self, record: Any, clients: Any, aggregation_s: float) -> None:
        if record.round == self._failing:
            raise OSError("no connection")
        self.news.append((record.round, len(clients), aggregation_s > 0.0))

    def close(self, outcome: str) -> None:
        self.news.append((outcome,))


def run(recipe: Recipe, location: Path, stop_after: int = 99, **options: Any) -> StatusBoard:
    board = StatusBoard(recipe.annealing.total_rounds)
    folder = RunFolder(location)
    resume = folder.exists("recipe.yaml")
    claim(folder, recipe, resume)
    simulate(
        recipe,
        local_engine(recipe),
        folder,
        board,
        lambda: board.status().rounds_done >= stop_after,
        resume=resume,
        **options,
    )
    return board


def events(location: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of every scalar, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(location / "tensorboard"))
    read.Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def test_a_tracker_is_told_of_each_round_and_how_the_session_ends(tmp_path):
    told = Told()
    run(make_recipe(), tmp_path, metrics=told)
    assert told.news == [("resumed", 0), *((t, 3, True) for t in range(6)), ("done",)]


def test_a_stopped_run_tells_so_and_the_next_session_what_there_is(tmp_path):
    first, second = Told(), Told()
    with pytest.raises(InterruptedRunError):
        run(make_recipe(), tmp_path, stop_after=2, metrics=first)
    assert first.news[-1] == ("stopped",)
    run(make_recipe(), tmp_path, metrics=second)
    done = len(first.news) - 2
    assert second.news[:2] == [("resumed", done), (done, 3, True)]


def test_a_tracker_that_fails_is_let_go_and_the_run_goes_on(tmp_path):
    told = Told(failing=2)
    board = run(make_recipe(), tmp_path, metrics=told)
    assert told.news == [("resumed", 0), (0, 3, True), (1, 3, True)]
    assert board.status().notes == ("Told failed and gets no more rounds: no connection",)
    assert board.status().rounds_done == 6


def assert_events_are_the_rounds(location: Path) -> None:
    rounds = pd.read_parquet(location / "rounds.parquet")
    found = events(location)
    columns = ("train_loss", "eval_accuracy", "eval_loss", "rank", "bytes_up", "learning_rate")
    for name in columns:
        wanted = rounds[["round", name]].dropna()
        assert [step for step, _ in found[name]] == wanted["round"].tolist(), name
        # An event holds float32.
        values = [value for _, value in found[name]]
        assert values == pytest.approx(wanted[name].tolist(), rel=1e-6), name


def test_event_files_hold_the_rounds(tmp_path):
    run(make_recipe(tracking__tensorboard=True), tmp_path)
    assert_events_are_the_rounds(tmp_path)


def test_event_files_of_a_resumed_run_hold_each_round_once(tmp_path):
    # Saved after every fourth round, stopped after the fifth, which is saved too.
    recipe = make_recipe(tracking__tensorboard=True, storage__checkpoint_every=4)
    with pytest.raises(InterruptedRunError):
        run(recipe, tmp_path, stop_after=5)
    run(recipe, tmp_path)
    assert_events_are_the_rounds(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_event_files_of_a_remote_run_folder_are_uploaded(tmp_path):
    run(make_recipe(), tmp_path)
    folder = RunFolder("mock://host/run")
    tracker = TensorBoard(folder)
    # Object stores make folders by themselves.
    folder._fs.create_dir("run/tensorboard")
    tracker.resumed(table(RunFolder(tmp_path), "rounds.parquet"))
    tracker.close("done")
    (name,) = folder.names("tensorboard")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / name).write_bytes(folder.read(f"tensorboard/{name}"))
    assert_events_are_the_rounds(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("tensorboard", True), ("wandb", "project"), ("mlflow", "experiment")]
)
def test_a_missing_package_is_named_before_anything_starts(tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(
        "rayfed_lora.runs.trackers.find_spec",
        lambda package: None if package == name else object(),
    )
    recipe = make_recipe(**{f"tracking__{name}": value})
    with pytest.raises(BadInputError) as refused:
        claim(RunFolder(tmp_path / "run"), recipe, resume=False)
    assert str(refused.value) == (
        f"tracking.{name}: expected the Python package {name} to be installed, it is not;"
        f" pip install 'rayfed-lora[{name}]'"
    )
    assert not (tmp_path / "run").exists()


def test_what_is_not_asked_for_need_not_be_there(monkeypatch):
    monkeypatch.setattr("rayfed_lora.runs.trackers.find_spec", lambda package: None)
    check_tracking(make_recipe())


def test_trackers_may_change_when_a_run_goes_on(tmp_path):
    with pytest.raises(InterruptedRunError):
        run(make_recipe(), tmp_path, stop_after=2)
    run(make_recipe(tracking__tensorboard=True), tmp_path)
    assert_events_are_the_rounds(tmp_path)
