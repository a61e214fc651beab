"""Early stopping and the best model, by the validation split."""

from __future__ import annotations

import math
from io import StringIO

import pytest

import rayfed_lora
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.plan_table import show_plan
from rayfed_lora.cli.run_display import show_summary
from rayfed_lora.errors import RecipeError, RunError
from rayfed_lora.federation.selection import Selection
from rayfed_lora.launching import planning
from rayfed_lora.recipe.loading import load_recipe
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
        ([math.inf, 1.0, math.inf], 1, False),  # a diverged model is no best one
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
    assert after_all(Evaluation(keep_best=True), "loss", [None, math.nan, math.inf]).kept is None
    assert Evaluation(keep_best=False).keep_best is None


def test_a_validation_split_is_made_and_must_be_possible():
    assert make_recipe(evaluation__keep_best="loss").validation_fraction == 0.1
    assert make_recipe().validation_fraction == 0.0
    with pytest.raises(RecipeError, match=r"evaluation.keep_best look at the validation split"):
        make_recipe(evaluation__keep_best="loss", data__validation_fraction=0.0)
    with pytest.raises(RecipeError, match="expected 'accuracy', 'loss'"):
        make_recipe(evaluation__keep_best="accurate")
    # An image model never has one: each test would count as one without an improvement.
    with pytest.raises(RecipeError, match="image-classification model has no perplexity"):
        make_recipe(evaluation__early_stopping={"metric": "perplexity"})


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


def fake_run(location, callbacks=(), *, resume=False, **settings):
    recipe = make_recipe(**settings)
    return rayfed_lora.run(
        recipe, str(location), factory=FakeFactory(), callbacks=callbacks, resume=resume
    )


def asks_after_the_first_round(done):
    return done.record.round == 0


def breaks_after_the_second_round(done):
    if done.record.round == 1:
        raise ValueError("broken")


@pytest.mark.parametrize("callbacks", [(), (asks_after_the_first_round,)])
def test_an_end_that_was_asked_for_waits_for_a_test_after_a_resume_too(callbacks, tmp_path):
    # Tested after rounds 3 and 6: asked for after round 1, the end comes after round 3.
    with pytest.raises(RunError, match="broken"):
        fake_run(
            tmp_path,
            (asks_after_the_first_round, breaks_after_the_second_round),
            evaluation__every=3,
        )
    run = fake_run(tmp_path, callbacks, resume=True, evaluation__every=3)
    assert len(run.rounds) == 3
    assert run.summary["stopped_by"] == "asks_after_the_first_round"
    assert "early_stopping" not in run.summary


def test_a_run_that_did_all_its_rounds_was_not_stopped(tmp_path):
    run = fake_run(tmp_path, [lambda done: done.record.round == 5])
    assert len(run.rounds) == 6 and "stopped_by" not in run.summary


TARGET = {
    "seed": 5,
    "annealing__acceptance": "target",
    "annealing__target__tolerance": 0.0,
}


@pytest.mark.parametrize(("every", "rounds"), [(1, 2), (2, 4), (3, 6)])
def test_rounds_that_annealing_alone_validates_do_not_count(every, rounds, tmp_path):
    """The second test is not better by 1000 than the first, and comes after 2 * `every` rounds."""
    stopping = {"metric": "loss", "patience": 1, "min_delta": 1000.0}
    settings = {**TARGET, "evaluation__every": every, "evaluation__keep_best": "loss"}
    run = fake_run(tmp_path, **settings, evaluation__early_stopping=stopping)
    losses = run.rounds["validation_loss"]
    # Each round is validated, for the annealing.
    assert losses.notna().all() and len(losses) == rounds
    tested = losses[run.rounds["eval_loss"].notna()]
    assert list(tested.index) == [every - 1, 2 * every - 1]
    assert run.summary["kept"]["round"] == tested.idxmin()
    assert run.summary["kept"]["eval_loss"] == run.rounds["eval_loss"][tested.idxmin()]
    ended = {"metric": "loss", "round": rounds - 1, "best": losses[every - 1], "tests": 1}
    assert run.summary.get("early_stopping") == (ended if rounds < 6 else None)


def test_the_card_has_the_scores_of_the_model_that_it_lies_beside(tmp_path):
    kept = fake_run(tmp_path / "kept", evaluation__keep_best="loss")
    losses = {name: f"{kept.summary[name]['eval_loss']:.4g}" for name in ("kept", "final")}
    assert losses["kept"] != losses["final"]
    card = (tmp_path / "kept" / "adapter" / "README.md").read_text()
    assert (
        f"| loss | {losses['kept']} |" in card and "## Results of the round that was kept" in card
    )
    fake_run(tmp_path / "last")
    card = (tmp_path / "last" / "adapter" / "README.md").read_text()
    assert f"| loss | {losses['final']} |" in card and "## Results of the last round" in card


def test_terminal_result_and_report_name_the_exported_model_and_what_ended_the_run(tmp_path):
    stopping = {"metric": "loss", "patience": 1, "min_delta": 1000.0}
    run = fake_run(tmp_path, evaluation__keep_best="loss", evaluation__early_stopping=stopping)
    assert len(run.rounds) == 2
    losses = run.rounds["validation_loss"]
    best = int(losses.idxmin())
    exported = f"round {best + 1}, best validation loss {losses[best]:.4f}"
    ended = (
        "early stopping after round 2: 1 tests without a better validation loss"
        f" (best {losses[0]:.4f})"
    )
    screen = PlainConsole(file=StringIO(), width=200)
    show_summary(screen, run.summary, "runs/a")
    for text in (screen.file.getvalue(), repr(run), run._repr_html_()):
        assert exported in text and ended in text
    page = (tmp_path / "report.html").read_text()
    assert exported in page and ended in page


def test_a_run_in_which_no_model_was_the_best_says_that_the_last_one_is_exported(tmp_path):
    # The fakes' examples are all of one class: they have no area under a curve.
    told: list[str] = []
    recipe = make_recipe(evaluation__keep_best="auc")
    run = rayfed_lora.run(
        recipe,
        str(tmp_path / "a"),
        factory=FakeFactory(),
        watch=lambda status: told.extend(status.notes),
    )
    last = fake_run(tmp_path / "b", data__validation_fraction=0.1)
    assert "kept" not in run.summary
    assert run.summary["adapter_sha256"] == last.summary["adapter_sha256"]
    assert any("no test on the validation split gave a finite auc" in note for note in told)


def test_a_plan_names_the_split_and_what_is_chosen_by_it():
    # 1797 digits, ceil(0.2 * 1797) = 360 of them for the test: ceil(0.1 * 1437) = 144 are kept.
    early = {"metric": "accuracy", "patience": 4}
    recipe = load_recipe(
        "digits-vit",
        {"evaluation.early_stopping": early, "evaluation.keep_best": "loss", "evaluation.every": 2},
    )
    screen = PlainConsole(file=StringIO(), width=200)
    show_plan(screen, recipe, planning.plan(recipe))
    text = screen.file.getvalue()
    assert "validation split of 144 training examples" in text
    assert "after 4 tests (one in 2 rounds) with no better validation accuracy" in text
    assert "exported: the model of the best validation loss" in text


@pytest.mark.parametrize("size", [1, 2])
def test_threads_keep_the_same_model_and_stop_alike(size, tmp_path):
    stopping = {"metric": "loss", "patience": 2}
    settings = {"evaluation__keep_best": "loss", "evaluation__early_stopping": stopping}
    one = fake_run(tmp_path / "one", **settings)
    threads = {"runtime__client_actors": 2, "runtime__cohort_size": size}
    several = fake_run(tmp_path / "threads", **settings, **threads)
    for key in ("adapter_sha256", "kept", "rounds"):
        assert one.summary[key] == several.summary[key]
    assert one.summary.get("early_stopping") == several.summary.get("early_stopping")
