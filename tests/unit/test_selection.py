"""Early stopping and the best model, by the validation split."""

from __future__ import annotations

import math

import pytest

import rayfed_lora
from rayfed_lora.errors import RecipeError
from rayfed_lora.federation.selection import Selection
from rayfed_lora.recipe.runtime import Evaluation
from rayfed_lora.runs.saving import Saving
from rayfed_lora.types import AdapterState, Base, GlobalModel
from tests.fakes import FakeFactory, make_recipe

MODEL = GlobalModel(AdapterState({}, {}), Base(), "full")


def after_all(settings: Evaluation, metric: str, values: list[float | None]) -> Selection:
    found = Selection()
    for t, value in enumerate(values):
        found = found.after(settings, t, MODEL, {metric: value})
        if found.stopped_by is not None:
            assert t == len(values) - 1, "stopped too early"
    return found


@pytest.mark.parametrize(
    ("values", "waited", "ends"),
    [
        ([1.0, 0.5, 0.5], 1, False),  # a tie is no improvement
        ([1.0, 0.5, 0.6, 0.7], 2, True),
        ([1.0, 0.95, 0.91], 2, True),  # by less than 0.1 each, and 0.09 in all
        ([1.0, 0.95, 0.85, 0.8], 1, False),  # 0.15 below the best one that counted
        ([math.nan, 1.0, math.nan], 1, False),
        ([None, None], 2, True),
    ],
)
def test_early_stopping_waits_for_an_improvement(values, waited, ends):
    stopping = {"metric": "loss", "patience": 2, "min_delta": 0.1}
    found = after_all(Evaluation(early_stopping=stopping), "loss", values)
    assert found.waited == waited
    assert (found.stopped_by == "early-stopping") is ends


def test_the_best_model_is_that_of_the_first_best_value_in_the_metrics_own_direction():
    assert after_all(Evaluation(keep_best="loss"), "loss", [3.0, 1.0, 1.0, 2.0]).kept.round == 1
    kept = after_all(Evaluation(keep_best="accuracy"), "accuracy", [0.3, 0.1, 0.3]).kept
    assert (kept.round, kept.value) == (0, 0.3)
    assert after_all(Evaluation(keep_best=True), "loss", [None, math.nan]).kept is None
    assert Evaluation(keep_best=False).keep_best is None


def test_a_validation_split_is_made_and_must_be_possible():
    assert make_recipe(evaluation__keep_best="loss").validation_fraction == 0.1
    assert make_recipe().validation_fraction == 0.0
    with pytest.raises(RecipeError, match=r"evaluation.keep_best look at the validation split"):
        make_recipe(evaluation__keep_best="loss", data__validation_fraction=0.0)
    with pytest.raises(RecipeError, match="expected 'accuracy', 'loss'"):
        make_recipe(evaluation__keep_best="accurate")


@pytest.mark.parametrize("every", [1, 2])
def test_the_exported_model_is_the_best_one_and_the_summary_says_which(every, tmp_path):
    recipe = make_recipe(evaluation__keep_best="loss", evaluation__every=every)
    run = rayfed_lora.run(recipe, str(tmp_path / "a"), factory=FakeFactory())
    losses = run.rounds["validation_loss"].dropna()
    best = int(losses.idxmin())
    assert len(losses) == 6 // every
    kept = run.summary["kept"]
    assert (kept["round"], kept["value"], kept["by"]) == (best, losses.min(), "loss")
    assert kept["eval_loss"] == run.rounds["eval_loss"][best]
    assert run.summary["final"]["round"] == 5
    # The same run, ended there.
    ended = rayfed_lora.run(
        make_recipe(evaluation__every=every, data__validation_fraction=0.1),
        str(tmp_path / "b"),
        factory=FakeFactory(),
        callbacks=[lambda done: done.record.round == best],
    )
    assert best < 5
    assert run.summary["adapter_sha256"] == ended.summary["adapter_sha256"]


def test_a_run_that_stopped_early_is_stopped_after_a_resume_too(tmp_path, monkeypatch):
    stopping = {"metric": "loss", "patience": 1, "min_delta": 1000.0}
    recipe = make_recipe(evaluation__early_stopping=stopping)
    whole = Saving.finish

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Saving, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory())
    monkeypatch.setattr(Saving, "finish", whole)
    run = rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory(), resume=True)
    # The first test is the best, the second not better by 1000.
    assert len(run.rounds) == 2
    assert run.summary["stopped_by"] == "early-stopping"
