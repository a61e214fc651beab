"""Search spaces: what they refuse, and the recipes that draws stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.loading import load_recipe, shipped_names
from rayfed_lora.tuning.draws import (
    apportioned,
    continued,
    recipe_values,
    trial_recipe,
    value_of,
)
from rayfed_lora.tuning.space import Space, check_objectives, load_space, shipped_spaces
from tests.fakes import make_recipe

RANK = {"annealing.heating.rank": {"choice": [4, 8]}}


def space(**others: Any) -> Space:
    return load_space({"parameters": RANK, **others})


def test_the_shipped_spaces_are_read_and_fit_the_shipped_recipes():
    assert list(shipped_spaces()) == [
        "allocation_and_rule",
        "heating_cooling",
        "learning_rate",
        "quick",
    ]
    for name in shipped_spaces():
        found = load_space(name)
        for recipe in shipped_names():
            for key in found.drawn:
                value_of(load_recipe(recipe), key)


def test_a_space_of_ones_own_is_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("parameters: {clients.batch_size: {randint: [4, 16]}}\n")
    assert load_space(path).parameters["clients.batch_size"].randint == (4, 16)
    assert load_space(str(path)).objectives == {"eval_accuracy": "max"}


def test_options_go_before_what_the_space_says():
    given = load_space("quick", search="random", samples=7, objectives={"eval_loss": "min"})
    assert (given.search, given.samples, given.objectives) == ("random", 7, {"eval_loss": "min"})
    assert load_space("quick", scheduler=None).scheduler == "none"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "something to draw"),
        ({"parameters": RANK, "sample": 3}, "sample: Extra inputs"),
        ({"parameters": RANK, "samples": 0}, "samples: .*greater than 0"),
        ({"parameters": RANK, "scheduler": "hyperband"}, "scheduler: .*'asha'"),
        ({"parameters": {"seed": {}}}, "expected one of choice, uniform, loguniform, randint"),
        ({"parameters": {"seed": {"choice": [1], "randint": [1, 2]}}}, "got .*choice.*randint"),
        ({"parameters": {"seed": {"choice": []}}}, "choice: .*at least 1"),
        ({"parameters": {"a.lr": {"uniform": [2, 1]}}}, r"uniform: \[low, high\], got \[2"),
        ({"parameters": {"a.lr": {"loguniform": [0, 1]}}}, "low end above 0"),
        (
            {"parameters": {"a": {"choice": [1], "of": "b"}, "b": {"choice": [2]}}},
            "expected b before it",
        ),
        (
            {
                "parameters": {"a": {"choice": [1], "of": "annealing.heating.rounds"}},
                "rounds": {"annealing.heating.rounds": {"uniform": [0, 1]}},
            },
            "annealing.heating.rounds before it, among the parameters",
        ),
        ({"rounds": {"annealing.heating.rounds": {"choice": ["long"]}}}, "shares of 0 or more"),
        ({"rounds": {"annealing.heating.rounds": {"uniform": [-1, 1]}}}, "shares of 0 or more"),
        ({"parameters": {"runtime.precision": {"choice": ["bf16"]}}}, "may differ between trials"),
        ({"rounds": {"annealing.rounds": {"uniform": [0, 1]}}}, "expected keys of annealing.init"),
        (
            {"rounds": {"annealing.heating.rounds": {"uniform": [0, 1], "of": "x"}}},
            "shares of 0 or more, without `of` and `when`",
        ),
        ({"parameters": RANK, "objectives": {"accuracy": "max"}}, "metrics of eval_accuracy"),
        ({"parameters": RANK, "objectives": {"eval_loss": "less"}}, "'max' or 'min'"),
        ({"parameters": {"a": {"uniform": [0, 1]}}, "search": "grid"}, "grid: expected choice"),
        ({"parameters": RANK, "search": "grid", "scheduler": "pbt"}, "pbt: expected search random"),
        (
            {
                "parameters": RANK,
                "search": "optuna",
                "scheduler": "asha",
                "objectives": {"eval_loss": "min", "total_bytes": "min"},
            },
            "several objectives: expected scheduler none",
        ),
    ],
)
def test_a_faulty_space_is_refused_with_the_reason(raw, message):
    with pytest.raises(BadInputError, match=message):
        load_space(raw)


def test_a_space_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(BadInputError, match="expected one of allocation_and_rule, heating"):
        load_space("heating")
    lines = tmp_path / "list.yaml"
    lines.write_text("- a\n")
    with pytest.raises(BadInputError, match="expected a mapping, got list"):
        load_space(lines)


def test_samples_mean_nothing_to_a_grid():
    with pytest.raises(BadInputError, match="each of its combinations once"):
        load_space("quick", samples=3)


def test_a_rank_is_drawn_as_a_share_of_another():
    found = space(
        parameters={
            **RANK,
            "annealing.cooling.rank": {"choice": [0.3], "of": "annealing.heating.rank"},
        }
    )
    recipe = make_recipe()
    draw = {"annealing.heating.rank": 8, "annealing.cooling.rank": 0.3}
    # 0.3 x 8 = 2.4
    assert recipe_values(found, draw, recipe)["annealing.cooling.rank"] == 2
    # 0.3 x 1 = 0.3; a rank is at least 1.
    assert (
        recipe_values(found, {**draw, "annealing.heating.rank": 1}, recipe)[
            "annealing.cooling.rank"
        ]
        == 1
    )


def test_a_share_of_what_is_not_drawn_is_one_of_the_recipes_own_value():
    found = space(
        parameters={"annealing.cooling.rank": {"choice": [0.5], "of": "annealing.heating.rank"}}
    )
    settings = recipe_values(
        found, {"annealing.cooling.rank": 0.5}, make_recipe(annealing__heating__rank=6)
    )
    assert settings == {"annealing.cooling.rank": 3}


def test_what_matters_beside_another_choice_only_is_left_out_elsewhere():
    found = space(
        parameters={
            "annealing.acceptance": {"choice": ["always", "metropolis"]},
            "annealing.temperature": {
                "uniform": [0.1, 1.0],
                "when": {"annealing.acceptance": "metropolis"},
            },
        }
    )
    draw = {"annealing.acceptance": "metropolis", "annealing.temperature": 0.5}
    assert recipe_values(found, draw, make_recipe()) == draw
    always = {**draw, "annealing.acceptance": "always"}
    assert recipe_values(found, always, make_recipe()) == {"annealing.acceptance": "always"}


def test_rounds_are_shares_of_what_their_stages_have_in_the_recipe():
    shares = {"uniform": [0.0, 1.0]}
    found = load_space(
        {"rounds": {"annealing.heating.rounds": shares, "annealing.cooling.rounds": shares}}
    )
    draw = {"annealing.heating.rounds": 0.1, "annealing.cooling.rounds": 0.3}
    # Heating and cooling have two rounds each in the recipe: a quarter of four is one.
    recipe = make_recipe()
    expected = {"annealing.heating.rounds": 1, "annealing.cooling.rounds": 3}
    assert recipe_values(found, draw, recipe) == expected
    drawn = trial_recipe(found, recipe, draw)
    assert drawn.annealing.total_rounds == recipe.annealing.total_rounds


def test_a_skipped_initiating_stage_takes_no_rounds():
    keys = [f"annealing.{stage}.rounds" for stage in ("initiating", "heating", "holding")]
    found = load_space({"rounds": {key: {"uniform": [0.0, 1.0]} for key in keys}})
    recipe = make_recipe(annealing__initiating__trainable="none")
    settings = recipe_values(found, dict.fromkeys(keys, 0.5), recipe)
    # Heating 2 and holding 1 are 3 rounds: 1.5 each, the first is rounded up.
    assert settings == {"annealing.heating.rounds": 2, "annealing.holding.rounds": 1}


@pytest.mark.parametrize(
    ("shares", "total", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, 3, [2, 1]),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, 6, [2, 2, 2]),
        ({"a": 0.0, "b": 5.0}, 4, [0, 4]),
        # 10/6, 20/6, 30/6 = 1.67, 3.33, 5
        ({"a": 1.0, "b": 2.0, "c": 3.0}, 10, [2, 3, 5]),
        ({"a": 1.0}, 0, [0]),
    ],
)
def test_shares_become_whole_rounds_that_sum_to_the_total(shares, total, expected):
    assert list(apportioned(shares, total).values()) == expected


def lengths(*rounds: int) -> dict[str, int]:
    stages = ("initiating", "heating", "cooling", "holding")
    return {f"annealing__{stage}__rounds": n for stage, n in zip(stages, rounds, strict=True)}


@pytest.mark.parametrize(
    ("before", "after", "done", "expected"),
    [
        # Over: initiating. Running: heating, one of its rounds done; the new one is shorter.
        ((1, 2, 2, 1), (1, 1, 3, 1), 2, (1, 1, 3, 1)),
        # Heating has run for two rounds: it cannot be shorter; cooling and holding give way.
        ((1, 3, 1, 1), (1, 1, 3, 1), 3, (1, 2, 3, 0)),
        # What is over stays as it was, though the new one has it otherwise.
        ((2, 2, 1, 1), (0, 2, 2, 2), 4, (2, 2, 2, 0)),
        # Holding takes up what is missing.
        ((1, 2, 2, 1), (1, 2, 1, 0), 3, (1, 2, 1, 2)),
        ((1, 2, 2, 1), (1, 2, 2, 1), 5, (1, 2, 2, 1)),
    ],
)
def test_a_changed_schedule_keeps_the_past_and_the_total(before, after, done, expected):
    old, new = make_recipe(**lengths(*before)), make_recipe(**lengths(*after))
    assert tuple(continued(old, new, done).values()) == expected


@pytest.mark.parametrize("mode", ["fixed", "full"])
def test_a_schedule_without_stages_is_not_changed(mode):
    recipe = make_recipe(annealing__mode=mode)
    assert continued(recipe, recipe, 2) == {}


def test_a_skipped_stage_keeps_what_the_recipe_says():
    recipe = make_recipe(annealing__initiating__trainable="none")
    found = continued(recipe, recipe, 2)
    assert load_recipe(recipe.model_dump(), found) == recipe
    assert "annealing.initiating.rounds" not in found


@pytest.mark.parametrize("key", ["clients.local_epochs", "clients.optimizer.name"])
def test_a_share_of_what_is_no_number_is_refused(key):
    found = space(parameters={"annealing.cooling.rank": {"choice": [0.5], "of": key}})
    with pytest.raises(BadInputError, match=r"a number to multiply it by, got 0\.5 and"):
        recipe_values(found, {"annealing.cooling.rank": 0.5}, make_recipe())


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("text-classification", "eval_perplexity"),
        ("image-classification", "eval_perplexity"),
        ("causal-lm", "eval_macro_f1"),
        ("causal-lm", "eval_auc"),
    ],
)
def test_an_objective_that_the_model_is_not_tested_for_is_refused(task, metric):
    settings = {"model__task": task, "adapter__train_head": task != "causal-lm"}
    with pytest.raises(BadInputError, match=f"{metric} is not measured with model.task '{task}'"):
        check_objectives(space(objectives={metric: "max"}), make_recipe(**settings))
    check_objectives(space(objectives={"eval_loss": "min"}), make_recipe(**settings))


def test_a_key_that_no_recipe_has_is_named():
    with pytest.raises(BadInputError, match=r"annealing\.heat\.rank: expected a key of the recipe"):
        value_of(make_recipe(), "annealing.heat.rank")


def test_a_path_to_nowhere_is_refused():
    with pytest.raises(BadInputError, match="readable YAML file"):
        load_space(Path("/nowhere.yaml"))
