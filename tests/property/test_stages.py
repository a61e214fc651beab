"""What holds of every schedule, whatever the feedback."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfed_lora.annealing import stages
from rayfed_lora.annealing.stages import Feedback
from rayfed_lora.recipe.annealing import Annealing

cheap = settings(max_examples=60, deadline=None)
SHAPES = st.sampled_from(
    ["linear", "cosine", "cubic", "exponential", "logarithmic", "step", "constant"]
)


@st.composite
def schedules(draw, acceptance: str = "always") -> Annealing:
    high = draw(st.integers(0, 32))
    heating_rounds = draw(st.integers(0, 4))
    return Annealing.model_validate(
        {
            "mode": draw(st.sampled_from(["staged", "staged", "full", "fixed"])),
            "initiating": {
                "rounds": draw(st.integers(0, 3)),
                "trainable": draw(st.sampled_from(["full", "adapter", "none"])),
            },
            "heating": {
                "rounds": heating_rounds,
                "rank": high,
                "shape": draw(st.sampled_from(["hold", "ramp"])),
            },
            "cooling": {
                "rounds": draw(st.integers(1, 12)),
                "rank": draw(st.integers(0, high)),
                "shape": draw(SHAPES),
                "steps": draw(st.integers(1, 6)),
            },
            "holding": {"rounds": draw(st.integers(0, 4))},
            "acceptance": acceptance,
            # without heating there is no best value there, and the recipe must give one
            "target": {"value": None if heating_rounds else 0.5},
            "temperature": 0.1,
            "temperature_decay": 0.5,
        }
    )


@cheap
@given(schedule=schedules())
def test_every_round_is_in_exactly_one_stage_and_the_stages_come_in_order(schedule):
    lengths = stages.stage_lengths(schedule)
    assert sum(lengths.values()) == schedule.total_rounds
    expected = [(stage, i) for stage, length in lengths.items() for i in range(length)]
    assert [stages.locate(schedule, t) for t in range(schedule.total_rounds)] == expected
    assert list(lengths) == ["initiating", "heating", "cooling", "holding"]


@cheap
@given(schedule=schedules())
def test_always_takes_the_scheduled_rank_which_only_falls_after_heating(schedule):
    rank, after_heating = None, []
    for t in range(schedule.total_rounds):
        plan = stages.plan_round(schedule, t, Feedback(rank=rank))
        assert plan.rank == stages.scheduled_rank(schedule, t)
        if plan.trainable == "full":
            assert plan.rank == 0
            continue
        fell = rank is not None and plan.rank < rank
        assert (plan.proposal is not None) == fell
        rank = plan.rank
        assert min(schedule.cooling.rank, rank) >= 0
        assert schedule.cooling.rank <= rank <= schedule.heating.rank
        if plan.stage in ("cooling", "holding"):
            after_heating.append(rank)
    assert after_heating == sorted(after_heating, reverse=True)
    if after_heating:
        constant = schedule.cooling.shape == "constant"
        end = schedule.heating.rank if constant else schedule.cooling.rank
        assert after_heating[-1] == end


@cheap
@given(
    schedule=schedules("metropolis"),
    seed=st.integers(0, 2**32 - 1),
)
def test_metropolis_takes_the_proposal_just_when_the_draw_is_below_the_boltzmann_factor(
    schedule, seed
):
    rng = np.random.default_rng(seed)
    rank, cooled = None, 0
    for t in range(schedule.total_rounds):
        e0, e1 = 1.0, float(1.0 + rng.normal() * 0.1)
        draw = float(rng.random())
        plan = stages.plan_round(schedule, t, Feedback(rank, e0, e1, draw))
        scheduled = stages.scheduled_rank(schedule, t)
        if plan.trainable == "full":
            continue
        if rank is not None and scheduled < rank:
            tau = 0.1 * 0.5**cooled
            taken = draw < float(np.exp(min(0.0, -(e1 - e0) / tau)))
            assert plan.rank == (scheduled if taken else rank)
            assert plan.proposal is not None
            assert plan.proposal.verdict == ("accepted" if taken else "rejected")
        else:
            assert (plan.rank, plan.proposal) == (scheduled, None)
        rank = plan.rank
        cooled += plan.stage == "cooling"


@cheap
@given(schedule=schedules("target"), metrics=st.lists(st.floats(0, 1), min_size=30, max_size=30))
def test_target_moves_one_step_a_round_and_stays_between_the_two_ranks(schedule, metrics):
    rank = None
    rungs = sorted(
        {schedule.heating.rank}
        | {
            stages.scheduled_rank(schedule, t)
            for t in range(schedule.total_rounds)
            if stages.locate(schedule, t)[0] in ("cooling", "holding")
        }
    )
    for t in range(schedule.total_rounds):
        feedback = Feedback(rank, metric=metrics[t], best_at_heating=0.5)
        plan = stages.plan_round(schedule, t, feedback)
        if plan.trainable == "full":
            continue
        assert schedule.cooling.rank <= plan.rank <= schedule.heating.rank
        if plan.stage in ("cooling", "holding") and rank in rungs:
            step = -1 if 0.5 - metrics[t] <= 0.01 else 1
            at = min(max(rungs.index(rank) + step, 0), len(rungs) - 1)
            assert plan.rank == rungs[at]
        rank = plan.rank


@cheap
@given(
    schedule=st.one_of(schedules("always"), schedules("metropolis"), schedules("target")),
    rank=st.one_of(st.none(), st.integers(0, 32)),
    numbers=st.tuples(*[st.floats(0, 2)] * 4),
    data=st.data(),
)
def test_the_same_feedback_gives_the_same_plan(schedule, rank, numbers, data):
    t = data.draw(st.integers(0, schedule.total_rounds - 1))
    feedback = Feedback(rank, numbers[0], numbers[1], numbers[2] / 2, numbers[3], 0.5)
    first = stages.plan_round(schedule, t, feedback)
    others = [stages.plan_round(schedule, s, feedback) for s in range(schedule.total_rounds)]
    assert others[t] == first
    assert first.round == t
    assert math.isfinite(first.proximal_weight)


@cheap
@given(schedule=schedules())
def test_the_adapter_rounds_before_a_round_are_those_counted_one_by_one(schedule):
    counted = 0
    for t in range(schedule.total_rounds):
        assert stages.adapter_rounds_before(schedule, t) == counted
        counted += not stages.is_full(schedule, t)
