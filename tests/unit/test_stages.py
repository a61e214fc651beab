"""The schedule round by round, and what feedback makes of its proposals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from rayfed_lora.annealing import acceptance, stages
from rayfed_lora.annealing.stages import Feedback
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.types import Proposal, RoundPlan


def annealing(**changes: Any) -> Annealing:
    """2 full + 2 heating at 16 + 4 cooling linearly to 2 + 2 holding rounds, or as changed.

    The cooling values are 16 - 14 u = 12.5, 9, 5.5, 2, so the ranks are 13, 9, 6, 2.
    """
    sections: dict[str, Any] = {
        "initiating": {"rounds": 2, "trainable": "full", "proximal_weight": 0.25},
        "heating": {"rounds": 2, "rank": 16},
        "cooling": {"rounds": 4, "rank": 2, "shape": "linear"},
        "holding": {"rounds": 2},
    }
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) else value
    return Annealing.model_validate(sections)


def walk(schedule: Annealing, feedback: Feedback | None = None) -> list[RoundPlan]:
    """Plan every round, each with the rank of the adapter round before it."""
    plans: list[RoundPlan] = []
    rank = None
    for t in range(schedule.total_rounds):
        plan = stages.plan_round(schedule, t, replace(feedback or Feedback(), rank=rank))
        plans.append(plan)
        rank = rank if plan.trainable == "full" else plan.rank
    return plans


def test_the_whole_schedule_is_the_table_worked_out_by_hand():
    def fall(rank: int) -> Proposal:
        return Proposal(rank, "accepted")

    assert walk(annealing()) == [
        RoundPlan(0, "initiating", "full", 0, 0.25),
        RoundPlan(1, "initiating", "full", 0, 0.25),
        RoundPlan(2, "heating", "adapter", 16, 0.0),
        RoundPlan(3, "heating", "adapter", 16, 0.0),
        RoundPlan(4, "cooling", "adapter", 13, 0.0, fall(13)),
        RoundPlan(5, "cooling", "adapter", 9, 0.0, fall(9)),
        RoundPlan(6, "cooling", "adapter", 6, 0.0, fall(6)),
        RoundPlan(7, "cooling", "adapter", 2, 0.0, fall(2)),
        RoundPlan(8, "holding", "adapter", 2, 0.0),
        RoundPlan(9, "holding", "adapter", 2, 0.0),
    ]


def test_an_adapter_initiating_stage_trains_the_heating_rank_with_the_proximal_term():
    plans = walk(annealing(initiating={"trainable": "adapter"}))
    assert plans[:3] == [
        RoundPlan(0, "initiating", "adapter", 16, 0.25),
        RoundPlan(1, "initiating", "adapter", 16, 0.25),
        RoundPlan(2, "heating", "adapter", 16, 0.0),
    ]
    assert len(plans) == 10


def test_an_initiating_stage_of_none_is_skipped_and_not_counted():
    schedule = annealing(initiating={"trainable": "none"})
    assert schedule.total_rounds == 2 + 4 + 2
    plans = walk(schedule)
    assert [p.stage for p in plans] == ["heating"] * 2 + ["cooling"] * 4 + ["holding"] * 2
    assert {p.proximal_weight for p in plans} == {0.0}


def test_full_mode_trains_the_whole_model_with_the_proximal_term_in_all_rounds():
    plans = walk(annealing(mode="full"))
    assert plans == [RoundPlan(t, "initiating", "full", 0, 0.25) for t in range(10)]


def test_full_mode_trains_the_whole_model_whatever_the_initiating_stage_would_train():
    plans = walk(annealing(mode="full", initiating={"trainable": "adapter"}))
    assert {p.trainable for p in plans} == {"full"}


def test_fixed_mode_trains_the_heating_rank_in_all_rounds_and_ignores_a_ramp():
    plans = walk(annealing(mode="fixed", heating={"shape": "ramp"}))
    assert plans == [RoundPlan(t, "heating", "adapter", 16, 0.0) for t in range(10)]


@pytest.mark.parametrize(
    ("mode", "lengths"),
    [("staged", [2, 2, 4, 2]), ("full", [10, 0, 0, 0]), ("fixed", [0, 10, 0, 0])],
)
def test_the_stage_lengths_of_each_mode_sum_to_the_same_rounds(mode, lengths):
    got = stages.stage_lengths(annealing(mode=mode))
    assert list(got.items()) == list(
        zip(["initiating", "heating", "cooling", "holding"], lengths, strict=True)
    )


def test_a_round_is_found_in_its_stage_with_its_index_inside_it():
    found = [stages.locate(annealing(), t) for t in range(10)]
    assert found == [
        ("initiating", 0),
        ("initiating", 1),
        ("heating", 0),
        ("heating", 1),
        *(("cooling", i) for i in range(4)),
        ("holding", 0),
        ("holding", 1),
    ]


def test_a_stage_without_rounds_is_passed_over():
    schedule = annealing(heating={"rounds": 0})
    assert [stages.locate(schedule, t)[0] for t in (1, 2)] == ["initiating", "cooling"]


@pytest.mark.parametrize("t", [-1, 10, 11])
def test_a_round_outside_the_schedule_is_refused(t):
    for look_up in (stages.locate, stages.scheduled_rank, stages.is_full):
        with pytest.raises(ValueError, match=rf"\[0, 10\), got {t}"):
            look_up(annealing(), t)
    with pytest.raises(ValueError, match=f"got {t}"):
        stages.plan_round(annealing(), t, Feedback())


def test_a_heating_ramp_rises_from_the_cooling_rank_to_the_heating_rank():
    # 2 + 14 i / 4 = 2, 5.5, 9, 12.5, 16
    schedule = annealing(heating={"rounds": 5, "shape": "ramp"})
    plans = walk(schedule)
    assert [p.rank for p in plans if p.stage == "heating"] == [2, 6, 9, 13, 16]
    assert {p.proposal for p in plans if p.stage == "heating"} == {None}


def test_constant_cooling_keeps_the_heating_rank_in_holding_too():
    plans = walk(annealing(cooling={"shape": "constant"}))
    assert [p.rank for p in plans[2:]] == [16] * 8
    assert {p.proposal for p in plans} == {None}


def test_step_cooling_proposes_only_where_a_plateau_ends():
    # two plateaus in four rounds: 16 - 14 * 1/2 = 9, then 2
    plans = walk(annealing(cooling={"shape": "step", "steps": 2}))
    assert [p.rank for p in plans[4:]] == [9, 9, 2, 2, 2, 2]
    proposed = [None if p.proposal is None else p.proposal.rank for p in plans[4:]]
    assert proposed == [9, None, 2, None, None, None]


def test_the_first_adapter_round_takes_its_rank_without_a_proposal():
    schedule = annealing(heating={"rounds": 0}, acceptance="metropolis")
    plan = stages.plan_round(schedule, 2, Feedback(rank=None))
    assert (plan.rank, plan.proposal) == (13, None)


def test_a_lower_scheduled_rank_is_proposed_and_any_other_is_not():
    schedule = annealing()
    assert stages.proposed_rank(schedule, 4, 16) == 13
    assert stages.proposed_rank(schedule, 4, 13) is None
    assert stages.proposed_rank(schedule, 4, 9) is None
    assert stages.proposed_rank(schedule, 4, None) is None
    assert stages.proposed_rank(schedule, 0, 16) is None


# Metropolis: second cooling round (t = 5), so tau = 0.1 * 0.5^1 = 0.05. A rise of 0.05 is then
# accepted with probability exp(-1) = 0.36788.
def metropolis(**changes: Any) -> Annealing:
    return annealing(acceptance="metropolis", temperature=0.1, temperature_decay=0.5, **changes)


def at_a_rise(draw: float, rank: int = 13) -> Feedback:
    return Feedback(rank=rank, energy_current=1.0, energy_proposed=1.05, draw=draw)


def test_metropolis_accepts_a_rise_whose_draw_is_below_its_probability():
    plan = stages.plan_round(metropolis(), 5, at_a_rise(draw=0.367))
    assert plan.rank == 9
    proposal = plan.proposal
    assert proposal is not None
    assert (proposal.rank, proposal.verdict) == (9, "accepted")
    assert (proposal.energy_current, proposal.energy_proposed) == (1.0, 1.05)
    assert proposal.temperature == pytest.approx(0.05)
    assert proposal.probability == pytest.approx(1 / math.e)
    assert proposal.draw == 0.367


def test_metropolis_keeps_the_current_rank_where_the_draw_is_not_below_the_probability():
    plan = stages.plan_round(metropolis(), 5, at_a_rise(draw=0.369))
    assert plan.rank == 13
    assert plan.proposal is not None
    assert (plan.proposal.rank, plan.proposal.verdict) == (9, "rejected")


def test_metropolis_always_accepts_a_fall_in_loss():
    for proposed in (0.9, 1.0):
        feedback = Feedback(13, energy_current=1.0, energy_proposed=proposed, draw=0.999999)
        plan = stages.plan_round(metropolis(), 5, feedback)
        assert plan.rank == 9
        assert plan.proposal is not None
        assert plan.proposal.probability == 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_metropolis_never_accepts_a_loss_that_is_not_finite(broken):
    feedback = Feedback(13, energy_current=1.0, energy_proposed=broken, draw=0.0)
    plan = stages.plan_round(metropolis(), 5, feedback)
    assert plan.rank == 13
    assert plan.proposal is not None
    assert (plan.proposal.probability, plan.proposal.verdict) == (0.0, "rejected")


def test_metropolis_proposes_again_after_a_rejection_also_in_holding():
    plans = walk(metropolis(), Feedback(energy_current=1.0, energy_proposed=2.0, draw=0.5))
    adapter = plans[2:]
    assert [p.rank for p in adapter] == [16] * 8
    proposed = [None if p.proposal is None else p.proposal.rank for p in adapter]
    assert proposed == [None, None, 13, 9, 6, 2, 2, 2]
    verdicts = {p.proposal.verdict for p in adapter if p.proposal is not None}
    assert verdicts == {"rejected"}


def test_the_temperature_decays_with_the_cooling_rounds_so_far():
    # before cooling 0 rounds; the cooling rounds 0 1 2 3; holding comes after all four
    got = [stages.temperature(metropolis(), t) for t in range(10)]
    exponents = [0, 0, 0, 0, 0, 1, 2, 3, 4, 4]
    assert got == pytest.approx([0.1 * 0.5**n for n in exponents])


def test_a_temperature_that_has_vanished_still_decides():
    assert acceptance.temperature(0.1, 0.1, 1000) == 0.0
    assert acceptance.metropolis_probability(1.0, 1.5, 0.0) == 0.0
    assert acceptance.metropolis_probability(1.0, 1.0, 0.0) == 1.0


@pytest.mark.parametrize("missing", ["energy_current", "energy_proposed", "draw"])
def test_metropolis_refuses_a_proposal_without_its_feedback(missing):
    with pytest.raises(ValueError, match="metropolis needs both energies and a draw"):
        stages.plan_round(metropolis(), 5, replace(at_a_rise(0.5), **{missing: None}))


def test_metropolis_needs_no_feedback_where_nothing_is_proposed():
    plan = stages.plan_round(metropolis(), 3, Feedback(rank=16))
    assert (plan.rank, plan.proposal) == (16, None)


# Target: the ladder is 16, 13, 9, 6, 2. With value 0.875 and tolerance 0.125 (exact in binary)
# an accuracy of 0.75 or more holds.
def target(**changes: Any) -> Annealing:
    settings = {"metric": "accuracy", "value": 0.875, "tolerance": 0.125, **changes}
    return annealing(acceptance="target", target=settings)


def test_the_ladder_has_the_heating_rank_and_the_scheduled_ranks_after_it():
    assert stages.ladder(annealing()) == (16, 13, 9, 6, 2)
    assert stages.ladder(annealing(heating={"rounds": 5, "shape": "ramp"})) == (16, 13, 9, 6, 2)
    assert stages.ladder(annealing(cooling={"shape": "constant"})) == (16,)


@pytest.mark.parametrize(("rank", "lower"), [(16, 13), (13, 9), (9, 6), (6, 2)])
def test_the_rank_goes_one_step_down_while_the_target_holds(rank, lower):
    plan = stages.plan_round(target(), 4, Feedback(rank=rank, metric=0.75))
    assert plan.rank == lower
    assert plan.proposal == Proposal(lower, "accepted", metric=0.75, target=0.875)


@pytest.mark.parametrize(("rank", "higher"), [(13, 16), (9, 13), (6, 9), (2, 6)])
def test_the_rank_goes_one_step_back_up_where_the_target_does_not_hold(rank, higher):
    plan = stages.plan_round(target(), 7, Feedback(rank=rank, metric=0.7499))
    assert plan.rank == higher
    assert plan.proposal == Proposal(higher, "reheated", metric=0.7499, target=0.875)


def test_the_rank_never_goes_below_the_cooling_rank_nor_above_the_heating_rank():
    lowest = stages.plan_round(target(), 9, Feedback(rank=2, metric=1.0))
    highest = stages.plan_round(target(), 4, Feedback(rank=16, metric=0.0))
    assert (lowest.rank, lowest.proposal) == (2, None)
    assert (highest.rank, highest.proposal) == (16, None)


def test_a_target_on_the_loss_holds_below_its_value():
    # loss 1.0 within 0.125: up to 1.125 holds
    schedule = target(metric="loss", value=1.0)
    ranks = [
        stages.plan_round(schedule, 5, Feedback(rank=9, metric=loss)).rank
        for loss in (0.1, 1.0, 1.125, 1.126)
    ]
    assert ranks == [6, 6, 6, 13]


def test_a_target_without_a_value_is_the_best_at_the_heating_rank():
    schedule = target(value=None)
    held = Feedback(rank=9, metric=0.5, best_at_heating=0.625)
    lost = Feedback(rank=9, metric=0.5, best_at_heating=0.626)
    assert stages.plan_round(schedule, 5, held).rank == 6
    plan = stages.plan_round(schedule, 5, lost)
    assert plan.rank == 13
    assert plan.proposal is not None
    assert plan.proposal.target == 0.626


def test_a_target_value_in_the_recipe_goes_before_the_best_at_the_heating_rank():
    feedback = Feedback(rank=9, metric=0.8, best_at_heating=0.99)
    assert stages.plan_round(target(), 5, feedback).rank == 6


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_never_holds(metric, broken):
    schedule = target(metric=metric)
    assert stages.plan_round(schedule, 5, Feedback(rank=9, metric=broken)).rank == 13


@pytest.mark.parametrize(
    ("metric", "value"), [(0.89, 0.9), (0.7, 0.71), (0.29, 0.3)], ids=["0.89", "0.70", "0.29"]
)
def test_a_metric_exactly_at_the_tolerance_holds(metric, value):
    # 0.9 - 0.89 = 0.01 and so on: just within a tolerance of 0.01
    assert acceptance.target_holds(metric, value, 0.01, higher_is_better=True)


def test_the_target_is_not_looked_at_before_cooling():
    for t, rank in ((0, 0), (2, 16), (3, 16)):
        plan = stages.plan_round(target(), t, Feedback(rank=16))
        assert (plan.rank, plan.proposal) == (rank, None)


@pytest.mark.parametrize(
    "feedback", [Feedback(rank=16), Feedback(rank=16, best_at_heating=0.9)], ids=["none", "metric"]
)
def test_target_acceptance_refuses_a_round_without_a_metric(feedback):
    with pytest.raises(ValueError, match="target acceptance needs a metric"):
        stages.plan_round(target(), 4, feedback)


def test_target_acceptance_refuses_a_round_without_anything_to_hold():
    with pytest.raises(ValueError, match="target acceptance needs a metric"):
        stages.plan_round(target(value=None), 4, Feedback(rank=16, metric=0.9))


@pytest.mark.parametrize(
    ("rank", "down", "step"), [(16, True, 8), (8, False, 16), (4, True, 4), (16, False, 16)]
)
def test_a_step_on_the_ladder_stops_at_its_ends(rank, down, step):
    assert acceptance.step_rank([16, 8, 4], rank, down=down) == step


def test_a_rank_between_the_rungs_steps_to_the_next_rung():
    assert acceptance.step_rank([16, 8, 4], 10, down=True) == 8
    assert acceptance.step_rank([16, 8, 4], 10, down=False) == 16


def test_the_adapter_rounds_before_a_late_round_are_known_without_a_look_at_the_earlier_ones():
    # 2 of them are full; one look at each would take a day
    assert stages.adapter_rounds_before(annealing(holding={"rounds": 10**12}), 10**12) == 10**12 - 2


def test_the_ladder_of_a_run_is_made_once():
    schedule = target()
    stages._ladder.cache_clear()
    for metric in (0.0, 1.0) * 5:
        stages.plan_round(schedule, 5, Feedback(rank=9, metric=metric))
    assert stages._ladder.cache_info().misses == 1
