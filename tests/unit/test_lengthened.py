"""More rounds on a run: a longer schedule whose past is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import rayfed_lora
from rayfed_lora.errors import RecipeError, RunError, RunFolderError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.resuming import recipe_and_place
from tests.fakes import FakeFactory, make_recipe


def recipe_of(**changes: Any) -> Recipe:
    """The small recipe of 1 + 2 + 2 + 1 rounds, with other keys."""
    return make_recipe(**changes)


def ran(recipe: Recipe, folder: Path, **options: Any) -> Any:
    return rayfed_lora.run(recipe, str(folder), factory=FakeFactory(), **options)


LONGER = {"annealing__holding__rounds": 5}


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"annealing__acceptance": "target", "evaluation__every": 3},
        {"annealing__acceptance": "metropolis"},
        {"annealing__mode": "fixed"},
        {"annealing__mode": "full"},
        {
            "clients__lr_schedule__shape": "cosine",
            "clients__lr_schedule__horizon": 6,
        },
        {"aggregation__server_optimizer__name": "adam"},
        {"clients__optimizer__lr": {"choices": [0.1, 0.2]}, "clients__local_steps": {"median": 2}},
        {"clients__objective": "scaffold", "annealing__mode": "fixed"},
    ],
)
def test_a_lengthened_run_is_the_long_run(tmp_path: Path, own: dict[str, Any]) -> None:
    short, long = recipe_of(**own), recipe_of(**own, **LONGER)
    rounds, more = short.annealing.total_rounds, long.annealing.total_rounds
    assert more == rounds + 4
    first = ran(short, tmp_path / "a").summary
    found = ran(long, tmp_path / "a", resume=True).summary
    whole = ran(long, tmp_path / "b").summary
    assert found["rounds"] == more
    assert found["adapter_sha256"] == whole["adapter_sha256"] != first["adapter_sha256"]
    assert found["communication"] == whole["communication"]
    tables = [pq.read_table(tmp_path / name / "rounds.parquet") for name in "ab"]
    for column in ("round", "stage", "rank", "lr", "train_loss", "up_bytes"):
        if column in tables[0].column_names:
            assert tables[0][column].to_pylist() == tables[1][column].to_pylist()
    # The folder is now one of the longer run.
    assert rayfed_lora.Result.open(str(tmp_path / "a")).summary["rounds"] == more
    assert ran(long, tmp_path / "a", resume=True).summary == found


def test_the_command_line_lengthens_a_run_by_its_folder(tmp_path: Path) -> None:
    ran(recipe_of(), tmp_path / "a")
    again = recipe_and_place(str(tmp_path / "a"), None, True, ["annealing.holding.rounds=3"])[0]
    assert ran(again, tmp_path / "a", resume=True).summary["rounds"] == 8


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        (
            {},
            {"annealing__heating__rounds": 4},
            r"whose round 4 was round 1 of cooling, rank \d+, it would be round 3 of heating",
        ),
        ({}, {"annealing__cooling__rounds": 9}, r"round 4 was round 1 of cooling, rank"),
        (
            {},
            {"annealing__holding__rounds": 0},
            "6 rounds; expected a schedule of at least as many",
        ),
        (
            {"clients__lr_schedule__shape": "linear"},
            LONGER,
            r"round 2 had learning rate .*clients.lr_schedule.horizon=6 keeps",
        ),
        (
            {"clients__lr_schedule__shape": "linear", "clients__optimizer__lr": {"median": 0.1}},
            LONGER,
            r"had learning rate 0\.\d+, it would have 0\.\d+ \(of a client whose own is 1\)",
        ),
        ({}, {**LONGER, "seed": 5}, r"another recipe; these keys differ: .*seed"),
    ],
)
def test_another_past_is_rejected_and_nothing_is_lost(
    tmp_path: Path, own: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    first = ran(recipe_of(**own), tmp_path / "a").summary
    with pytest.raises(RunFolderError, match=message):
        ran(recipe_of(**own, **changes), tmp_path / "a", resume=True)
    assert rayfed_lora.Result.open(str(tmp_path / "a")).summary == first


def test_a_run_that_was_ended_early_is_not_lengthened(tmp_path: Path) -> None:
    first = ran(recipe_of(), tmp_path / "a", callbacks=[lambda done: done.record.round == 3])
    assert first.summary["stopped_by"]
    with pytest.raises(RunFolderError, match=r"ended by callback .* model.adapter="):
        ran(recipe_of(**LONGER), tmp_path / "a", resume=True)
    assert rayfed_lora.Result.open(str(tmp_path / "a")).summary == first.summary


def test_a_lengthened_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    ran(recipe_of(), tmp_path / "a")
    long = recipe_of(**LONGER)

    def broken(done: rayfed_lora.FinishedRound) -> None:
        assert done.record.round < 7

    with pytest.raises(RunError, match="after round 8"):
        ran(long, tmp_path / "a", resume=True, callbacks=[broken])
    assert not (tmp_path / "a" / "summary.json").exists()
    # By its folder alone: the recipe in it is the longer one.
    again, _ = recipe_and_place(str(tmp_path / "a"), None, True)
    found = ran(again, tmp_path / "a", resume=True)
    assert found.summary["adapter_sha256"] == ran(long, tmp_path / "b").summary["adapter_sha256"]


def test_the_horizon_comes_after_the_warm_up() -> None:
    with pytest.raises(RecipeError, match=r"expected more than warmup_rounds \(3\), got 3"):
        recipe_of(clients__lr_schedule__warmup_rounds=3, clients__lr_schedule__horizon=3)
