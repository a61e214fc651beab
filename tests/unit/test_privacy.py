"""Client-level privacy: clipping, noise, fixed denominators, sampling, epsilon."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import rayfed_lora
from rayfed_lora.errors import BadInputError, RecipeError
from rayfed_lora.federation import privacy, server
from rayfed_lora.federation.privacy import Accountant, check_privacy
from rayfed_lora.federation.run import fresh
from rayfed_lora.federation.sampling import ClientHistory, cohort
from rayfed_lora.federation.server import Server
from rayfed_lora.launching.planning import plan
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from tests.fakes import Behaviour, FakeFactory, initial, local_engine, make_recipe
from tests.unit.test_methods import Silent

FIXED: dict[str, Any] = {
    "mode": "fixed",
    "initiating": {"rounds": 0},
    "heating": {"rounds": 2, "rank": 3},
    "cooling": {"rounds": 0},
    "holding": {"rounds": 0},
}
# 57 values at rank 3: an update of 1 in each has this norm.
ONES = math.sqrt(57)
SIX = ClientHistory.empty(np.ones(6, np.int64))
QUIET = {"clip": ONES, "noise_multiplier": 1e-12, "delta": 1e-3}


def private(settings: dict[str, Any], **overrides: Any) -> Recipe:
    values = {"annealing": FIXED, "clients__per_round": 6, **overrides}
    return make_recipe(privacy=settings, **values)


@pytest.fixture
def uncounted(monkeypatch):
    """Runs do not ask for epsilon."""
    monkeypatch.setattr(server.Accountant, "epsilon", lambda self, rounds: None)


def models(recipe: Recipe, behaviour: Behaviour | None = None) -> list[Any]:
    engine = local_engine(recipe, *([] if behaviour is None else [behaviour]))
    population = engine.open()
    loop = Server(recipe, engine, population, Silent(), lambda: False)
    return [run.model.state for run in loop.rounds(fresh(recipe, engine, population))]


@pytest.mark.usefixtures("uncounted")
def test_clipped_clients_count_the_same():
    first, second = models(private(QUIET))
    # Client k adds k + t to every value; clipped to the norm of ones: 0 or 1. The weights are 1.
    np.testing.assert_allclose(first.dense["head"], initial("head") + 5 / 6, rtol=1e-5)
    np.testing.assert_allclose(second.dense["head"], initial("head") + 5 / 6 + 1, rtol=1e-5)


@pytest.mark.usefixtures("uncounted")
def test_the_denominator_stays_when_a_client_fails():
    failing = Behaviour(failing=frozenset({(3, 0)}))
    first, _ = models(private(QUIET), failing)
    np.testing.assert_allclose(first.dense["head"], initial("head") + 4 / 6, rtol=1e-5)


@pytest.mark.usefixtures("uncounted")
def test_noise_has_the_standard_deviation_of_multiplier_times_clip_over_the_cohort():
    quiet = models(private(QUIET))[0]
    moves = []
    for seed in range(40):
        loud = {**QUIET, "noise_multiplier": 3.0}
        state = models(private(loud, seed=seed))[0]
        head = state.dense["head"] - quiet.dense["head"]
        moves += [head.ravel(), state.factors["q"].b.ravel() - quiet.factors["q"].b.ravel()]
    noise = np.concatenate(moves)
    expected, count = 3.0 * ONES / 6, len(noise)
    assert noise.std() == pytest.approx(expected, abs=5 * expected / math.sqrt(2 * count))
    assert abs(noise.mean()) < 5 * expected / math.sqrt(count)


@pytest.mark.usefixtures("uncounted")
def test_a_frozen_factor_gets_no_noise():
    recipe = private({**QUIET, "noise_multiplier": 3.0}, aggregation__rule="freeze-a")
    first, second = models(recipe)
    np.testing.assert_array_equal(first.factors["q"].a, second.factors["q"].a)
    assert (first.factors["q"].b != second.factors["q"].b).all()


@pytest.mark.usefixtures("uncounted")
def test_a_round_without_any_client_still_gets_noise():
    settings = {**QUIET, "noise_multiplier": 3.0, "sampling": "poisson"}
    seeds = range(60)
    recipes = (private(settings, seed=seed, clients__per_round=1) for seed in seeds)
    # (5 / 6) ** 6 = 33 % of rounds have no client.
    recipe = next(r for r in recipes if not cohort(r, SIX, 0))
    first = models(recipe)[0]
    assert (first.dense["head"] != initial("head")).all()


def test_poisson_cohorts_are_drawn_client_by_client():
    recipe = private({**QUIET, "sampling": "poisson"}, clients__per_round=2)
    sizes = [len(cohort(recipe, SIX, t)) for t in range(3000)]
    # Binomial of 6 and 1/3: mean 2, variance 4/3.
    assert np.mean(sizes) == pytest.approx(2.0, abs=5 * math.sqrt(4 / 3 / 3000))
    assert np.var(sizes) == pytest.approx(4 / 3, abs=0.2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"annealing__mode": "full"}, "noise on every weight"),
        ({"annealing": {"initiating": {"rounds": 1}}}, "noise on every weight"),
        ({"aggregation__rule": "median"}, "uses more of single clients than the mean"),
        ({"aggregation__rule": "product-svd"}, "uses more of single clients than the mean"),
        ({"aggregation__rule": "residual"}, "one of the rules alternate, factor-average, freeze-a"),
        ({"clients__availability": 0.1}, "epsilon holds for clients drawn uniformly"),
        ({"clients__over_select": 1.5}, "epsilon holds for clients drawn uniformly"),
        ({"clients__sampler": "power-of-choice"}, "expected uniform, got 'power-of-choice'"),
        ({"clients__objective": "scaffold"}, "which are not clipped"),
    ],
)
def test_settings_for_which_epsilon_does_not_hold_are_faults(settings, reason):
    with pytest.raises(RecipeError, match=reason):
        private(QUIET, **settings)


def test_a_missing_accountant_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(privacy, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r"pip install 'rayfed-lora\[privacy\]'"):
        check_privacy(private(QUIET))
    check_privacy(make_recipe())


def accountant(clients: int, per_round: int, **settings: Any) -> Accountant:
    values = {"clip": 1.0, "delta": 1e-5, **settings}
    recipe = private(values, clients__per_round=per_round, data__partition__clients=clients)
    return Accountant(recipe, clients)


def test_epsilon_is_that_of_known_settings():
    # Abadi et al. 2016, arXiv:1607.00133, section 5.2: q = 0.01, sigma = 4, delta = 1e-5 and
    # T = 10,000: epsilon 1.26 by the moments accountant. A Renyi accountant is a little tighter.
    found = accountant(10_000, 100, noise_multiplier=4.0, sampling="poisson").epsilon(10_000)
    assert 1.0 < found <= 1.26


def test_epsilon_without_sampling_is_at_most_that_of_the_closed_form():
    # All clients, T rounds: RDP a T / (2 z^2), so that epsilon is at most
    # T / (2 z^2) + sqrt(2 T log(1/delta)) / z (Mironov 2017, arXiv:1702.07476), and not far below.
    rounds, z = 16, 8.0
    bound = rounds / (2 * z**2) + math.sqrt(2 * rounds * math.log(1e5)) / z
    added = accountant(6, 6, noise_multiplier=z, sampling="poisson").epsilon(rounds)
    assert 0.7 * bound < added <= bound
    # One client replaced moves the sum twice as far.
    replaced = accountant(6, 6, noise_multiplier=2 * z).epsilon(rounds)
    assert replaced == pytest.approx(added, rel=1e-6)


def test_epsilon_rises_with_rounds_and_falls_with_noise_and_with_sampling():
    few, many = (accountant(1000, 10, noise_multiplier=2.0).epsilon(t) for t in (1, 100))
    quiet = accountant(1000, 10, noise_multiplier=4.0).epsilon(100)
    everyone = accountant(1000, 1000, noise_multiplier=2.0).epsilon(100)
    assert 0 < few < many < everyone and quiet < many


def test_plan_rounds_and_summary_have_the_same_epsilon(tmp_path):
    recipe = private({**QUIET, "noise_multiplier": 2.0, "sampling": "poisson"})
    result = rayfed_lora.run(recipe, str(tmp_path / "a"), factory=FakeFactory())
    expected = [Accountant(recipe, 6).epsilon(t) for t in (1, 2)]
    assert result.rounds["epsilon"].tolist() == expected and expected[0] < expected[1]
    assert result.summary["privacy"]["epsilon"] == expected[1]
    assert "one client added or removed" in result.summary["privacy"]["meaning"]
    digits = load_recipe(
        "digits-vit",
        {
            "method": "ffa-lora",
            "privacy": {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
        },
    )
    planned = plan(digits)
    epsilons = [planned_round.epsilon for planned_round in planned.rounds]
    assert epsilons == sorted(epsilons) and epsilons[0] > 0
    assert any(f"epsilon {epsilons[-1]:.3g} at delta 0.001" in line for line in planned.needs)
