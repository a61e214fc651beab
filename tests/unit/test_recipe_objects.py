"""Recipes made or changed in Python are filled in and checked like those of files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import rayfed_lora
from rayfed_lora.diagnosis.doctor import doctor
from rayfed_lora.errors import RecipeError
from rayfed_lora.jobs.jobs import Jobs
from rayfed_lora.launching.cells import cells_of
from rayfed_lora.launching.launch import start
from rayfed_lora.recipe.annealing import Annealing, Heating
from rayfed_lora.recipe.clients import Clients, Optimizer
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.model import Model
from rayfed_lora.recipe.presets import PRESETS
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.runtime import Storage
from rayfed_lora.recipe.settings import Aggregation, ServerOptimizer
from tests.fake_jobs import FakeClient
from tests.fakes import FakeFactory, make_recipe

MODEL = {"config": {"architecture": "vit"}}


def changed(recipe: Recipe, **rank: Any) -> Recipe:
    """Return a copy whose cooling rank is another one, unchecked as pydantic's copies are."""
    cooling = recipe.annealing.cooling.model_copy(update={"rank": 99})
    annealing = recipe.annealing.model_copy(update={"cooling": cooling})
    return recipe.model_copy(update={"annealing": annealing, **rank})


DOORS = {
    "load_recipe": lambda recipe, out: load_recipe(recipe),
    "run": lambda recipe, out: rayfed_lora.run(recipe, out, factory=FakeFactory()),
    "start": lambda recipe, out: start(recipe, out, address="127.0.0.1:1"),
    "plan": lambda recipe, out: rayfed_lora.plan(recipe),
    "compare": lambda recipe, out: rayfed_lora.compare(recipe, ["sa-fedlora"], out),
    "tune": lambda recipe, out: rayfed_lora.tune("quick", recipe, out),
    "submit": lambda recipe, out: Jobs(client=FakeClient()).submit(recipe, out),
    "doctor": lambda recipe, out: doctor(recipes=[recipe]),
    "validate": lambda recipe, out: load_recipe(Recipe.model_validate(recipe)),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_changed_copy_is_checked_whole_by_every_door(tmp_path, door):
    refused = (RecipeError, ValidationError) if door == "validate" else RecipeError
    with pytest.raises(refused) as error:
        DOORS[door](changed(make_recipe()), str(tmp_path / "out"))
    assert "annealing.cooling.rank: expected at most heating.rank (3), got 99" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_all_faults_of_a_copy_are_listed_with_their_paths():
    copy = changed(make_recipe(), seed=-1, clients={"per_round": "many", "speed": 0})
    with pytest.raises(RecipeError) as error:
        load_recipe(copy)
    paths = {fault.path for fault in error.value.faults}
    assert {"seed", "clients.per_round", "clients.speed.median"} <= paths


def test_values_cannot_be_assigned_and_changes_inside_them_are_seen():
    recipe = make_recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.annealing.cooling.rank = 99
    recipe.model.config["architecture"] = 7
    with pytest.raises(RecipeError, match=r"model\.config\.architecture"):
        load_recipe(recipe)


@pytest.mark.parametrize("method", PRESETS)
def test_pythons_own_call_fills_in_what_a_file_does(method):
    expected = load_recipe({"method": method, "model": MODEL})
    assert Recipe(method=method, model=Model(**MODEL)) == expected
    assert Recipe(method=method, model=MODEL) == expected
    # What is resolved stays as it is.
    assert load_recipe(expected) == expected
    assert Recipe.model_validate(expected.model_dump()) == expected
    assert Recipe.model_validate_json(expected.model_dump_json()) == expected


def test_sections_made_in_python_hold_what_was_written_and_presets_the_rest():
    given = {
        "method": "flora",
        "annealing": {"heating": {"rank": 8, "rounds": 2}},
        "clients": {"optimizer": {"name": "adamw"}},
        "aggregation": {"server_optimizer": {"lr": 0.5}},
    }
    made = Recipe(
        method="flora",
        model=Model(**MODEL),
        annealing=Annealing(heating=Heating(rank=8, rounds=2)),
        clients=Clients(optimizer=Optimizer(name="adamw")),
        aggregation=Aggregation(server_optimizer=ServerOptimizer(lr=0.5)),
    )
    assert made == load_recipe({**given, "model": MODEL})
    assert (made.annealing.mode, made.aggregation.rule) == ("fixed", "stacking")
    assert load_recipe({**given, "model": Model(**MODEL), "clients": made.clients}) == made


def test_adamw_under_falling_ranks_gets_its_scaling_in_python_too():
    made = Recipe(model=MODEL, clients=Clients(optimizer=Optimizer(name="adamw")))
    assert made.adapter.scaling == "alpha_over_rank"


def test_a_language_model_made_in_python_trains_no_head():
    config = {"architecture": "llama"}
    assert not Recipe(model=Model(task="causal-lm", config=config)).adapter.train_head


def test_pythons_own_call_checks_values_that_do_not_go_together():
    with pytest.raises(ValidationError, match=r"expected at most heating\.rank"):
        Recipe(model=MODEL, annealing=Annealing(heating=Heating(rank=1)))


def test_a_copy_with_another_method_gets_its_preset():
    recipe = load_recipe({"model": MODEL, "annealing": {"heating": {"rank": 8}}})
    copy = recipe.model_copy(update={"method": "flora"})
    assert load_recipe(copy) == load_recipe(
        {"model": MODEL, "annealing": {"heating": {"rank": 8}}}, {"method": "flora"}
    )
    (cell,) = cells_of(pickle.loads(pickle.dumps(copy)), {"own": {}}, [0], "out")
    assert (cell.recipe.annealing.mode, cell.recipe.aggregation.rule) == ("fixed", "stacking")


def test_a_copy_keeps_what_is_changed_beside_its_method():
    given = {"model": MODEL, "annealing": {"heating": {"rank": 8}, "initiating": {"rounds": 3}}}
    recipe = load_recipe(given)
    settings = {
        "method": "flexlora",
        "aggregation.rule": "zero-pad",
        "annealing.mode": "staged",
        "clients.ranks": {2: 0.5, 4: 0.5},
    }
    copy = recipe.model_copy(
        update={
            "method": "flexlora",
            "aggregation": recipe.aggregation.model_copy(update={"rule": "zero-pad"}),
            "annealing": recipe.annealing.model_copy(update={"mode": "staged"}),
            "clients": recipe.clients.model_copy(update={"ranks": {2: 0.5, 4: 0.5}}),
        }
    )
    loaded = load_recipe(copy)
    assert loaded.aggregation.rule == "zero-pad"
    # A mode that is the one it had says nothing, as what is written in a file: the preset's counts.
    assert loaded == load_recipe(given, {k: v for k, v in settings.items() if "mode" not in k})
    assert load_recipe(pickle.loads(pickle.dumps(copy))) == loaded
    assert load_recipe(loaded) == loaded
    # Shares are one value, and the configuration is taken as it is.
    again = load_recipe(given, {"clients.ranks": {2: 0.5, 4: 0.5}, "aggregation.rule": "zero-pad"})
    clients = again.clients.model_copy(update={"ranks": {2: 0.5, 8: 0.5}})
    again = again.model_copy(update={"method": "hetlora", "clients": clients})
    again.model.config["hidden_size"] = 8
    assert load_recipe(again).clients.ranks == {2: 0.5, 8: 0.5}
    del again.model.config["hidden_size"]
    assert load_recipe(again).model.config == MODEL["config"]


@pytest.mark.parametrize("method", ["sa-fedlora", "flora"])
def test_names_of_a_copy_that_are_no_keys_are_refused(method):
    recipe = make_recipe()
    clients = recipe.clients.model_copy(update={"localsteps": 3})
    momentum = recipe.clients.optimizer.model_copy(update={"momentun": 0.5})
    for update, path in (
        ({"seeed": 3}, "seeed"),
        ({"clients": clients}, "clients.localsteps"),
        (
            {"clients": clients.model_copy(update={"optimizer": momentum})},
            "clients.optimizer.momentun",
        ),
    ):
        copy = recipe.model_copy(update={**update, "method": method})
        with pytest.raises(RecipeError) as error:
            load_recipe(copy)
        faults = {fault.path: fault.expected for fault in error.value.faults}
        assert faults[path].startswith("unknown key")
    with pytest.raises(ValidationError, match="localsteps"):
        Recipe(model=MODEL, clients=clients)


def test_numbers_of_numpy_and_paths_are_taken_and_kept_as_plain_values(tmp_path):
    made = Recipe(
        model=MODEL,
        seed=np.int64(5),
        data=Data(source=tmp_path / "x.parquet", labels=np.array([3, 4])),
        storage=Storage(path=Path("runs")),
        clients=Clients(per_round=np.int32(3), max_grad_norm=np.float64(0.5), ranks=(4, 16)),
        aggregation={"rule": "product-svd"},
    )
    assert load_recipe(parse(recipe_yaml(made))) == made
    assert (made.seed, made.data.labels, made.clients.ranks) == (5, [3, 4], [4, 16])
    assert type(made.seed) is int and type(made.clients.max_grad_norm) is float
    copy = make_recipe().model_copy(update={"seed": np.int64(9)})
    assert type(load_recipe(copy).seed) is int
    assert load_recipe("digits-vit", {"seed": np.int64(9)}).seed == 9


def parse(text: str) -> Any:
    from rayfed_lora.recipe.yaml_text import parse_yaml

    return parse_yaml("kept", text)


def test_a_recipe_travels_as_it_is_and_equals_its_copies():
    recipe = load_recipe("digits-vit", {"method": "flora"})
    there = pickle.loads(pickle.dumps(recipe))
    assert there == recipe and there.preset == "flora" and there.asked == recipe.asked
    assert recipe.model_copy() == recipe and recipe.model_copy(deep=True) == recipe
    assert recipe != recipe.model_copy(update={"seed": 1}) and recipe != "recipe"


def test_a_changed_copy_that_is_valid_runs(tmp_path):
    holding = make_recipe().annealing.holding.model_copy(update={"rounds": 2})
    annealing = make_recipe().annealing.model_copy(update={"holding": holding})
    copy = make_recipe().model_copy(update={"annealing": annealing})
    result = rayfed_lora.run(copy, str(tmp_path / "run"), factory=FakeFactory())
    assert len(result.rounds) == 7
