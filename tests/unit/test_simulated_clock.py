"""The simulated clock: who is there in time, how long rounds take, what was sent by then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed_lora.errors import RunError
from rayfed_lora.federation.bills import Bill
from rayfed_lora.federation.simulated_clock import SimulatedClock, Turnout
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import AvailabilityTrace, DeviceFacts
from tests.fakes import make_recipe

SIZES = np.array([10, 20, 30, 40, 50, 60])
# A megabit a second carries 31,250 values of four bytes.
VALUES = 31_250
STEPS = {"clients__local_epochs": 1, "clients__per_round": 6}


def devices(facts: DeviceFacts | None = None, **overrides: Any) -> SimulatedClock:
    return SimulatedClock(recipe(**overrides), facts or DeviceFacts(SIZES))


def recipe(**overrides: Any) -> Recipe:
    return make_recipe(**{**STEPS, **overrides})


def bill(cohort: int, up: int = VALUES, down: int = VALUES, base: int = 0) -> Bill:
    return Bill(np.full(cohort, up), np.full(cohort, down), np.full(cohort, base), arrived=cohort)


def turnout(found: SimulatedClock, *, full: bool = False, **sizes: int) -> Turnout:
    return found.turnout(0, tuple(range(6)), bill(6, **sizes), full, now=0.0)


def test_a_client_downloads_trains_and_uploads_one_after_the_other():
    found = turnout(
        devices(clients__speed=10, network={"up_mbps": 0.5, "down_mbps": 2.0, "latency_s": 0.25}),
        base=VALUES,
    )
    # Two megabits down at 2 Mbit/s: 1 s; examples / 10 s; one up at 0.5: 2 s; twice the latency.
    expected = 1.0 + SIZES / 10 + 2.0 + 2 * 0.25
    np.testing.assert_allclose(found.seconds, expected)
    assert found.length_s == pytest.approx(9.5)
    assert found.absences == {}
    assert found.sent.up.tolist() == found.sent.down.tolist() == [1.0] * 6


def test_steps_of_a_batch_count_the_examples_that_a_client_has_for_it():
    found = turnout(devices(clients__local_epochs=None, clients__local_steps=3, clients__speed=1))
    # Batches of 16: client 0 has only 10 examples.
    np.testing.assert_allclose(found.seconds, [30, 48, 48, 48, 48, 48])


def test_a_full_model_takes_half_as_long_again():
    found = turnout(devices(clients__speed=1), full=True)
    np.testing.assert_allclose(found.seconds, 1.5 * SIZES)


def test_where_nothing_takes_time_all_arrive_at_once():
    found = turnout(devices(clients__over_select=1.0))
    assert (found.length_s, found.absences) == (0.0, {})


def test_who_is_late_at_the_deadline_has_sent_the_part_that_fits():
    found = turnout(devices(clients__speed=10, clients__deadline_s=5.25, network={"up_mbps": 0.5}))
    # Uploads of 2 s begin after 1, 2, .. 6 s: client 3 has sent for 1.25 s, client 4 for 0.25 s.
    assert found.absences == {3: "late", 4: "late", 5: "late"}
    assert found.length_s == 5.25
    np.testing.assert_allclose(found.sent.up, [1, 1, 1, 0.625, 0.125, 0])
    np.testing.assert_allclose(found.sent.down, 1)
    np.testing.assert_allclose(found.seconds, [3, 4, 5, 5.25, 5.25, 5.25])


def test_a_download_that_is_cut_is_counted_in_part():
    found = turnout(devices(network={"down_mbps": 1.0}, clients__deadline_s=0.25))
    assert set(found.absences.values()) == {"late"}
    np.testing.assert_allclose(found.sent.down, 0.25)
    np.testing.assert_allclose(found.sent.up, 0)


def test_of_more_than_are_wanted_the_first_are_taken_and_the_round_ends_with_them():
    found = turnout(devices(clients__per_round=4, clients__over_select=1.5, clients__speed=10))
    assert found.absences == {4: "late", 5: "late"}
    assert found.length_s == 4.0


def test_who_arrives_at_the_same_moment_is_taken_by_chance_and_the_same_each_time():
    found = [
        SimulatedClock(
            recipe(seed=seed, clients__per_round=3, clients__over_select=2.0), DeviceFacts(SIZES)
        )
        for seed in range(40)
    ]
    late = [tuple(turnout(each).absences) for each in found]
    assert all(len(each) == 3 for each in late)
    assert set(range(6)) == {client for each in late for client in each}
    assert late == [tuple(turnout(each).absences) for each in found]


@given(seed=st.integers(0, 1000), dropout=st.sampled_from([0.0, 0.3, 0.9]))
def test_shares_and_times_make_sense_whatever_happens(seed, dropout):
    found = turnout(
        devices(
            seed=seed,
            clients__availability=dropout,
            clients__speed={"median": 10, "sigma": 1.0},
            clients__deadline_s=6.0,
            network={"up_mbps": {"distribution": "uniform", "low": 0.2, "high": 2}, "down_mbps": 1},
        )
    )
    assert 0 <= found.length_s <= 6.0
    assert (found.seconds <= found.length_s + 1e-9).all()
    absent = found.sent.absent
    assert set(np.flatnonzero(absent)) == set(found.absences)
    assert (found.sent.up[~absent] == 1).all()
    assert ((0 <= found.sent.up) & (found.sent.up <= found.sent.down)).all()
    # Whoever has begun to send has the whole download.
    assert (found.sent.down[found.sent.up > 0] == 1).all()


def test_clients_leave_as_often_as_they_are_said_to():
    sizes = np.full(20_000, 10)
    own = SimulatedClock(
        recipe(data__partition__clients=20_000, clients__availability=0.3, clients__speed=1.0),
        DeviceFacts(sizes),
    )
    everyone = tuple(range(20_000))
    found = own.turnout(0, everyone, bill(20_000), full=False, now=0.0)
    left = np.array([found.seconds[k] for k, why in found.absences.items() if why == "dropped"])
    # Four standard deviations of a share of 20,000, and of the mean of a uniform draw.
    assert len(left) / 20_000 == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 20_000))
    assert left.mean() == pytest.approx(5.0, abs=4 * 10 / np.sqrt(12 * len(left)))
    assert found.length_s == 10.0


def test_each_client_keeps_its_own_speed_and_another_seed_draws_others():
    settings = {"clients__speed": {"median": 10, "sigma": 0.5}}
    one, again, other = (turnout(devices(seed=seed, **settings)).seconds for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).all()


def test_a_lognormal_speed_has_its_median_in_the_middle():
    sizes = np.full(20_000, 10)
    wide = recipe(
        data__partition__clients=20_000,
        clients__per_round=1.0,
        clients__speed={"median": 4.0, "sigma": 0.7},
    )
    found = SimulatedClock(wide, DeviceFacts(sizes)).turnout(
        0, tuple(range(20_000)), bill(20_000), full=False, now=0.0
    )
    logs = np.log(10 / found.seconds)
    # Four standard errors of a median (1.25 sigma / sqrt(n)) and of a standard deviation.
    assert np.median(logs) == pytest.approx(np.log(4.0), abs=4 * 1.25 * 0.7 / np.sqrt(20_000))
    assert logs.std() == pytest.approx(0.7, abs=4 * 0.7 / np.sqrt(2 * 20_000))


def test_a_column_gives_each_client_its_number():
    facts = DeviceFacts(SIZES, {"pace": np.array([1.0, 2, 3, 4, 5, 6])})
    found = turnout(devices(facts, clients__speed={"column": "pace"}))
    np.testing.assert_allclose(found.seconds, 10)


TRACE = AvailabilityTrace(
    client=np.array([0, 1, 2, 0]),
    start_s=np.array([0.0, 0.0, 50.0, 80.0]),
    end_s=np.array([30.0, 10.0, 60.0, 90.0]),
)


def traced(**overrides: Any) -> SimulatedClock:
    availability = {"trace": "times.csv", **overrides.pop("availability", {})}
    own = recipe(clients__availability=availability, clients__speed=1.0, **overrides)
    return SimulatedClock(own, DeviceFacts(SIZES, trace=TRACE))


def test_only_who_can_be_reached_is_drawn_and_the_server_waits_for_the_first():
    found = traced(clients__per_round=2)
    assert found.cohort(0, 0.0) == ((0, 1), 0.0)
    assert found.cohort(1, 10.0) == ((0,), 10.0)
    assert found.cohort(2, 31.0) == ((2,), 50.0)


def test_a_client_leaves_when_its_trace_says_so():
    found = traced().turnout(0, (0, 1), bill(2), full=False, now=5.0)
    # Client 0 needs 10 s and has 25; client 1 needs 20 and has 5.
    assert found.absences == {1: "dropped"}
    np.testing.assert_allclose(found.seconds, [10, 5])
    assert found.length_s == 10.0


def test_a_trace_that_has_ended_ends_the_run_and_says_so():
    with pytest.raises(RunError, match=r"no client can be reached after 90 s .* period_s"):
        traced().cohort(0, 90.0)


@pytest.mark.parametrize(("now", "expected"), [(95.0, 100.0), (125.0, 125.0), (335.0, 350.0)])
def test_a_trace_with_a_period_begins_anew(now, expected):
    found = traced(availability={"period_s": 100.0})
    _, began = found.cohort(0, now)
    assert began == expected


@given(now=st.floats(0, 1e7), period=st.floats(0.7, 1e5))
def test_the_server_never_waits_for_ever(now, period):
    trace = AvailabilityTrace(np.array([3]), np.array([0.3]), np.array([0.7]))
    own = recipe(clients__availability={"trace": "times.csv", "period_s": period})
    found = SimulatedClock(own, DeviceFacts(SIZES, trace=trace))
    cohort, began = found.cohort(0, now)
    assert cohort == (3,)
    assert now - 1e-6 <= began <= now + period + 0.3 + 1e-6


@pytest.mark.parametrize("period", [100.0, 3600.1, 0.7, 86164.0905])
def test_the_clock_goes_on_from_lap_to_lap(period):
    own = recipe(
        clients__per_round=1.0,
        clients__local_epochs=1,
        clients__speed=60 / (0.3 * period),
        clients__availability={"trace": "times.csv", "period_s": period},
    )
    everyone = np.arange(6)
    trace = AvailabilityTrace(everyone, np.zeros(6), np.full(6, round(0.9 * period, 6)))
    found = SimulatedClock(own, DeviceFacts(SIZES, trace=trace))
    now = 0.0
    for t in range(200):
        cohort, began = found.cohort(t, now)
        round_ = found.turnout(t, cohort, bill(len(cohort)), full=False, now=began)
        assert began + round_.length_s > now
        now = began + round_.length_s
    # A round takes three tenths of a lap, of which nine tenths can be used: three rounds a lap.
    assert now == pytest.approx(200 / 3 * period, rel=0.05)


def test_who_can_be_reached_over_the_end_of_a_lap_stays():
    trace = AvailabilityTrace(
        np.array([0, 1, 1]), np.array([0.0, 0, 60]), np.array([100.0, 5, 100])
    )
    own = recipe(
        clients__speed=1.0, clients__availability={"trace": "times.csv", "period_s": 100.0}
    )
    found = SimulatedClock(own, DeviceFacts(SIZES, trace=trace)).turnout(
        0, (0, 1), bill(2), full=False, now=90.0
    )
    # Client 0 is always there and needs 10 s; client 1 needs 20 s and is there for 10 + 5.
    assert found.absences == {1: "dropped"}
    np.testing.assert_allclose(found.seconds, [10, 15])
