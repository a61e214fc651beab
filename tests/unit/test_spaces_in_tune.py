"""Spaces in Tune's terms."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, PopulationBasedTraining

from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tuning import distributions, schedulers
from rayfed_lora.tuning.distributions import DRAW
from rayfed_lora.tuning.draws import recipe_values, trial_recipe
from rayfed_lora.tuning.space import load_space
from tests import fakes
from tests.fakes import make_recipe

RATE = {"clients.optimizer.lr": {"loguniform": [0.01, 0.1]}}


def test_values_are_drawn_from_the_distributions_of_the_space():
    space = load_space(
        {
            "parameters": {
                "seed": {"randint": [3, 4]},
                "clients.optimizer.lr": {"loguniform": [0.01, 0.1]},
                "clients.optimizer.momentum": {"uniform": [0.2, 0.3]},
                "annealing.cooling.shape": {"choice": ["linear", "cosine"]},
            }
        }
    )
    domains = distributions.param_space(space, make_recipe())[DRAW]
    random = np.random.RandomState(0)
    draws = {key: [domains[key].sample(random_state=random) for _ in range(50)] for key in domains}
    assert set(draws["seed"]) == {3, 4}
    assert set(draws["annealing.cooling.shape"]) == {"linear", "cosine"}
    assert all(0.01 <= value <= 0.1 for value in draws["clients.optimizer.lr"])
    assert all(0.2 <= value <= 0.3 for value in draws["clients.optimizer.momentum"])


def test_a_grid_has_each_recipe_once():
    space = load_space(
        {
            "parameters": {
                "annealing.acceptance": {"choice": ["always", "metropolis"]},
                "annealing.temperature": {
                    "choice": [0.1, 0.2, 0.3],
                    "when": {"annealing.acceptance": "metropolis"},
                },
                "clients.batch_size": {"randint": [4, 5]},
            },
            "search": "grid",
            "scheduler": "none",
        }
    )
    recipe = make_recipe()
    draws = distributions.grid(space, recipe)
    # Without metropolis the three temperatures are the same recipe: (1 + 3) x 2.
    assert len(draws) == 8
    settings = [recipe_values(space, draw, recipe) for draw in draws]
    assert len({str(s) for s in settings}) == 8
    assert distributions.param_space(space, recipe) == {DRAW: {"grid_search": draws}}


def test_a_space_of_recipes_that_cannot_run_is_refused_with_the_reason():
    space = load_space({"parameters": {"annealing.cooling.shape": {"choice": ["sine", "tan"]}}})
    with pytest.raises(
        BadInputError, match=r"(?s)no draw is a valid recipe.*annealing\.cooling\.shape"
    ):
        distributions.invalid_draws(space, make_recipe())


def test_a_space_of_which_some_draws_cannot_run_says_how_many():
    space = load_space(
        {
            "parameters": {"clients.per_round": {"choice": [1, 2, 3, 7]}},
            "search": "grid",
            "scheduler": "none",
        }
    )
    # There are six clients.
    assert distributions.invalid_draws(space, make_recipe()) == 250
    assert distributions.invalid_draws(load_space({"parameters": RATE}), make_recipe()) == 0


@pytest.mark.parametrize("recipe", ["trec-minilm", "digits-vit"])
@pytest.mark.parametrize(
    "space", ["quick", "heating_cooling", "learning_rate", "allocation_and_rule"]
)
def test_every_draw_of_a_shipped_space_can_run(space, recipe):
    assert distributions.invalid_draws(load_space(space), load_recipe(recipe)) == 0


RECIPE = make_recipe()


def scheduler(name: str, **others: Any) -> Any:
    return schedulers.scheduler(
        load_space({"parameters": RATE, "scheduler": name, **others}), RECIPE
    )


def test_schedulers_look_at_the_first_objective_by_round():
    asha = scheduler("asha", objectives={"eval_loss": "min", "total_bytes": "min"})
    assert isinstance(asha, ASHAScheduler)
    assert (asha._metric, asha._metric_op, asha._time_attr) == ("eval_loss", -1.0, "round")
    assert asha._max_t == 6
    assert isinstance(scheduler("median"), MedianStoppingRule)
    assert scheduler("none") is None


def test_a_population_changes_what_a_run_may_change_within_the_limits():
    space = load_space(
        {
            "parameters": {
                **RATE,
                "annealing.cooling.shape": {"choice": ["linear", "cosine"]},
                "data.partition.alpha": {"choice": [0.1, 1.0]},
            },
            "scheduler": "pbt",
        }
    )
    assert isinstance(schedulers.scheduler(space, RECIPE), PopulationBasedTraining)
    assert set(schedulers.mutations(space)) == {"clients.optimizer.lr", "annealing.cooling.shape"}
    config = {DRAW: {"clients.optimizer.lr": 0.12, "annealing.cooling.shape": "linear"}}
    assert schedulers.clipping(space)(config)[DRAW]["clients.optimizer.lr"] == 0.1
    fixed = load_space({"parameters": {"seed": {"choice": [1, 2]}}, "scheduler": "pbt"})
    with pytest.raises(BadInputError, match="a key that can change during a run"):
        schedulers.scheduler(fixed, RECIPE)


def test_optuna_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    space = load_space({"parameters": RATE, "search": "optuna"})
    schedulers.searcher(space, RECIPE, 2)
    real = builtins.__import__

    def without(name: str, *args: Any, **others: Any) -> Any:
        if name.startswith("ray.tune.search.optuna"):
            raise ImportError(name)
        return real(name, *args, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInputError, match="pip install optuna"):
        schedulers.searcher(space, RECIPE, 2)


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        ("sa-fedlora", []),
        ("fedlora", ["annealing.cooling.rank", "annealing.holding.rounds"]),
        (
            "fedavg",
            ["annealing.heating.rank", "annealing.cooling.rank", "annealing.holding.rounds"],
        ),
    ],
)
def test_keys_that_a_mode_does_not_look_at_are_named(method, idle):
    space = load_space(
        {
            "parameters": {
                **RATE,
                "annealing.heating.rank": {"choice": [2, 3]},
                "annealing.cooling.rank": {"choice": [1, 2]},
            },
            "rounds": {"annealing.holding.rounds": {"uniform": [0.0, 1.0]}},
        }
    )
    assert distributions.without_effect(space, make_recipe(method=method)) == idle
    drawn_too = {"parameters": {**RATE, "method": {"choice": ["fedavg", "fedlora"]}}}
    assert distributions.without_effect(load_space(drawn_too), make_recipe(method=method)) == []


def test_a_drawn_optimiser_has_its_usual_values_unless_they_were_changed():
    space = load_space(
        {
            "parameters": {
                "clients.optimizer.name": {"choice": ["sgd", "adamw"]},
                "aggregation.server_optimizer.name": {"choice": ["sgd", "adam"]},
            }
        }
    )

    def drawn(recipe: Recipe, clients: str, server: str) -> tuple[str, float]:
        names = {"clients.optimizer.name": clients, "aggregation.server_optimizer.name": server}
        found = trial_recipe(space, recipe, names)
        alone = load_recipe(fakes.RECIPE, names)
        if recipe == make_recipe():
            assert found == alone
        return found.adapter.scaling, found.aggregation.server_optimizer.lr

    for recipe in (
        make_recipe(),
        make_recipe(clients__optimizer__name="adamw", aggregation__server_optimizer__name="adam"),
    ):
        assert drawn(recipe, "sgd", "adam") == ("constant", 0.01)
        assert drawn(recipe, "adamw", "sgd") == ("alpha_over_rank", 1.0)
    own = make_recipe(adapter__scaling="rslora", aggregation__server_optimizer__lr=0.5)
    assert drawn(own, "adamw", "adam") == ("rslora", 0.5)


def test_a_schedulers_end_is_that_of_the_longest_trial():
    lengths = {"parameters": {"annealing.cooling.rounds": {"choice": [2, 20]}}}
    recipe = make_recipe()
    longest = recipe.annealing.total_rounds - recipe.annealing.cooling.rounds + 20
    made = schedulers.scheduler(load_space({**lengths, "scheduler": "asha"}), recipe)
    assert made._max_t == longest


def test_a_population_does_not_change_ranks_that_clients_hold():
    ranks = {"parameters": {**RATE, "annealing.heating.rank": {"choice": [2, 3]}}}
    space = load_space({**ranks, "scheduler": "pbt"})
    assert schedulers.scheduler(space, make_recipe()) is not None
    with pytest.raises(BadInputError, match=r"no annealing\.heating\.rank .* rule 'share-a'"):
        schedulers.scheduler(space, make_recipe(method="fedsa-lora"))
