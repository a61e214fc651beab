"""Own acceptance rules and allocations."""

from __future__ import annotations

import pytest

import rayfed_lora
from rayfed_lora.annealing.stages import Feedback, plan_round
from rayfed_lora.errors import RecipeError, RunError
from rayfed_lora.plugins import acceptance, allocation
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from tests.fakes import FakeFactory, make_recipe

pytestmark = pytest.mark.usefixtures("forgotten_methods")


def test_an_own_acceptance_decides_on_what_it_asked_for(tmp_path):
    seen = []

    @acceptance(needs="energies")
    def gentle(offer, *, most: float = 0.0):
        """Accept while the loss rises by no more than `most`."""
        seen.append(offer)
        return (
            offer.proposed if offer.energy_proposed - offer.energy_current <= most else offer.rank
        )

    recipe = make_recipe(data__validation_fraction=0.2)
    runs = {}
    for most in (-1e9, 1e9):
        runs[most] = rayfed_lora.run(
            recipe, str(tmp_path / str(most)), plugins=[gentle(most=most)], factory=FakeFactory()
        ).rounds
    ranks = {most: rounds["rank"].dropna().tolist() for most, rounds in runs.items()}
    # Never accepted: the heating rank throughout; always accepted: the schedule.
    assert set(ranks[-1e9]) == {recipe.annealing.heating.rank}
    assert ranks[1e9] == [p.rank for p in rayfed_lora_schedule(recipe) if p.trainable == "adapter"]
    assert all(offer.draw is not None and offer.metric is None for offer in seen)
    assert seen[0].ladder[0] == recipe.annealing.heating.rank


def rayfed_lora_schedule(recipe):
    from rayfed_lora.annealing.stages import schedule

    return [*schedule(recipe.annealing)]


def test_one_that_watches_a_metric_is_asked_in_each_round_of_cooling_and_holding():
    @acceptance(needs="metric")
    def upwards(offer):
        assert offer.energy_current is None
        return offer.rank if offer.metric > offer.target else max(offer.ladder)

    recipe = make_recipe(annealing__acceptance="upwards")
    annealing = recipe.annealing
    last = annealing.total_rounds - 1
    feedback = Feedback(rank=2, metric=0.5, best_at_heating=0.9)
    plan = plan_round(annealing, last, feedback)
    assert (plan.rank, plan.proposal.verdict) == (annealing.heating.rank, "reheated")
    assert (plan.proposal.metric, plan.proposal.target) == (0.5, 0.9)
    held = plan_round(annealing, last, Feedback(rank=2, metric=0.95, best_at_heating=0.9))
    assert held.rank == 2
    assert recipe.validation_fraction == 0.1


@pytest.mark.parametrize("returned", [0, 100, 2.5, True, None, "2"])
def test_what_an_acceptance_returns_is_checked(returned, tmp_path):
    @acceptance()
    def odd(offer):
        return returned

    recipe = make_recipe(annealing__acceptance="odd")
    with pytest.raises(RunError, match=r"(?s)acceptance 'odd' failed in round .*expected a rank"):
        rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory())


def test_an_own_allocation_shares_the_budget_in_plan_and_run(tmp_path):
    @allocation()
    def first_only(shapes, rank, *, less: int = 0):
        """Give what is left of the budget to the first module, as far as it can use it."""
        first, *rest = shapes
        most = max(min(rank, shapes[first].max_rank) - less, 1)
        return {first: most, **dict.fromkeys(rest, 0)}

    recipe = load_recipe(make_recipe(), {"annealing.allocation": {"name": "first-only", "less": 1}})
    run = rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory())
    for row in run.rounds[run.rounds["rank"].notna()].to_dict("records"):
        first, *rest = dict(row["ranks"]).values()
        assert first >= 1 and not any(rest)
    again = rayfed_lora.load_recipe(str(tmp_path / "recipe.yaml"))
    assert again.annealing.allocates.options["less"] == 1


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda shapes, rank: dict.fromkeys(shapes, 10**6), "expected a rank 0 to"),
        (lambda shapes, rank: {}, "expected a rank for each of"),
        (lambda shapes, rank: dict.fromkeys(shapes, 1.0), "expected a rank 0 to"),
        (
            lambda shapes, rank: {n: s.max_rank for n, s in shapes.items()},
            "expected at most the .* values of rank",
        ),
    ],
)
def test_what_an_allocation_returns_is_checked(returned, said, tmp_path):
    @allocation()
    def odd(shapes, rank):
        return returned(shapes, min(rank, 1))

    recipe = make_recipe(annealing__allocation="odd", annealing__heating__rank=1)
    with pytest.raises(RunError, match=rf"(?s)allocation 'odd' failed in round .*{said}"):
        rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory())


def test_older_recipes_name_them_by_a_text_and_options_are_typed():
    old = make_recipe(annealing__acceptance="target", annealing__allocation="spectral")
    assert old.annealing.acceptance == "target"
    assert load_recipe({**old.model_dump(mode="json")}) == old
    assert "acceptance: target" in recipe_yaml(old)
    with pytest.raises(RecipeError, match="allocation"):
        load_recipe(old, {"annealing.allocation": {"name": "uniform", "share": 1}})
