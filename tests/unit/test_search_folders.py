"""What a trial reports, and how one run becomes another's past."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints
from rayfed_lora.runs.checked import table
from rayfed_lora.runs.claiming import kept_recipe
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.draws import trial_recipe
from rayfed_lora.tuning.search_folders import apply_draw, copy_run, measured
from rayfed_lora.tuning.space import load_space
from tests.fakes import local_engine, make_recipe

SPACE = load_space(
    {
        "parameters": {
            "annealing.cooling.rank": {"choice": [1, 2]},
            "clients.optimizer.lr": {"uniform": [0.01, 0.1]},
        },
        "rounds": {
            "annealing.heating.rounds": {"uniform": [0.1, 1.0]},
            "annealing.cooling.rounds": {"uniform": [0.1, 1.0]},
        },
    }
)
DRAW = {
    "annealing.cooling.rank": 1,
    "clients.optimizer.lr": 0.05,
    "annealing.heating.rounds": 0.5,
    "annealing.cooling.rounds": 0.5,
}


def run(recipe: Recipe, folder: RunFolder, rounds: int | None = None) -> None:
    """Run some rounds, or to the end."""
    board = StatusBoard(recipe.annealing.total_rounds)
    going = simulate_rounds(
        recipe, local_engine(recipe), folder, board, lambda: False, resume=True, page=False
    )
    for tables in going:
        if tables.rounds.num_rows == rounds:
            going.close()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of three of six rounds."""
    found = RunFolder(tmp_path / "source")
    run(trial_recipe(SPACE, make_recipe(), DRAW), found, 3)
    return found


def test_a_run_that_is_closed_keeps_its_finished_rounds_and_goes_on(folder, tmp_path):
    assert table(folder, "rounds.parquet").num_rows == 3
    recipe = kept_recipe(folder)
    run(recipe, folder)
    run(recipe, RunFolder(tmp_path / "whole"))
    shas = [
        json.loads((tmp_path / name / "summary.json").read_text())["adapter_sha256"]
        for name in ("source", "whole")
    ]
    assert shas[0] == shas[1]
    assert not folder.exists("report.html")


def test_a_run_that_saves_rarely_keeps_all_its_finished_rounds_too(tmp_path):
    found = RunFolder(tmp_path)
    run(make_recipe(storage__checkpoint_every=5), found, 3)
    assert table(found, "rounds.parquet").num_rows == 3
    assert checkpoints.newest(found, lambda text: None).rounds == 3


def test_a_report_has_the_newest_values_and_what_was_sent_so_far(tmp_path):
    found = RunFolder(tmp_path)
    run(make_recipe(evaluation__every=2), found)
    rounds = pq.read_table(tmp_path / "rounds.parquet")
    rows = rounds.to_pylist()
    # Of three rounds the second is the newest that was tested.
    report = measured(rounds.slice(0, 3))
    assert (report["round"], report["stage"], report["rank"]) == (3, "heating", 3)
    assert report["train_loss"] == rows[2]["train_loss"]
    assert report["eval_loss"] == rows[1]["eval_loss"]
    sent = sum(row["bytes_up"] + row["bytes_down"] for row in rows[:3])
    assert report["total_bytes"] == sent
    assert measured(rounds.slice(0, 1))["eval_accuracy"] is None


def test_a_copy_of_a_run_is_the_run(folder, tmp_path):
    to = RunFolder(tmp_path / "copy")
    copy_run(folder, to)
    run(kept_recipe(to), to)
    run(kept_recipe(folder), folder)
    one, other = (json.loads(f.read("summary.json")) for f in (folder, to))
    assert one["adapter_sha256"] == other["adapter_sha256"]


def test_another_draw_changes_the_rest_of_a_run(folder):
    before = folder.read("recipe.yaml")
    apply_draw(folder, SPACE, make_recipe(), DRAW)
    assert folder.read("recipe.yaml") == before and not folder.exists("changes.json")
    other = {**DRAW, "annealing.cooling.rank": 2, "clients.optimizer.lr": 0.1}
    apply_draw(folder, SPACE, make_recipe(), other)
    recipe = kept_recipe(folder)
    run(recipe, folder)
    rows = table(folder, "rounds.parquet").to_pylist()
    assert [row["learning_rate"] for row in rows] == [0.05] * 3 + [0.1] * 3
    # One full round, two of heating at rank 3, two of cooling to rank 2, one of holding.
    assert [row["rank"] for row in rows] == [None, 3.0, 3.0, 3.0, 2.0, 2.0]
    (change,) = json.loads(folder.read("changes.json"))
    assert change["after_round"] == 3
    assert load_recipe(make_recipe().model_dump(), change["settings"]) == recipe


def test_the_same_draw_again_changes_nothing_more(folder):
    other = {**DRAW, "annealing.heating.rounds": 0.1}
    apply_draw(folder, SPACE, make_recipe(), other)
    first = folder.read("recipe.yaml")
    run(kept_recipe(folder), folder, 5)
    apply_draw(folder, SPACE, make_recipe(), other)
    assert folder.read("recipe.yaml") == first
    assert len(json.loads(folder.read("changes.json"))) == 1


def test_a_run_that_has_not_begun_has_nothing_to_adopt(tmp_path):
    found = RunFolder(tmp_path)
    apply_draw(found, SPACE, make_recipe(), DRAW)
    assert found.names() == []
