"""What every engine owes the round loop: a fake, one thread, threads, one Ray actor, and two."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.errors import ClientError, RunError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.settings import ServerOptimizer
from rayfed_lora.runs import checkpoints
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Engine, Population, Running
from rayfed_lora.tasks.messages import Block, Evaluate, Initial, TestClients, Train, Trained
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel, LocalPlan
from tests.fakes import (
    SHAPE,
    WEIGHTS,
    Behaviour,
    FakeEngine,
    FakeFactory,
    energy,
    initial,
    local_engine,
    make_recipe,
)

Make = Callable[[str, Behaviour], Engine]

STATE = AdapterState(
    {
        "q": Factors(np.ones((2, 4), np.float32), np.zeros((6, 2), np.float32), 2.0),
        "v": Factors(np.zeros((0, 3), np.float32), np.zeros((4, 0), np.float32), 2.0),
    },
    {"head": initial("head")},
)
PLAN = LocalPlan(round=2, trainable="adapter", lr=0.1, proximal_weight=0.0)
# Two actors of three engines fit on the four CPUs of the session.
ACTOR = {"runtime__cpus_per_actor": 0.5}
WITHOUT_FAULTS = Behaviour()
# Client 1 fails in round 0, all do in round 3, 1 raises in round 5; clients 4 and 5 are slow.
FAULTY = Behaviour(
    failing=frozenset({(1, 0), *((client, 3) for client in range(6))}),
    raising=frozenset({(1, 5)}),
    sleep_s={4: 120.0, 5: 120.0},
)
ONE_STAGE: dict[str, Any] = {
    "annealing__mode": "full",
    "annealing__heating__rounds": 0,
    "annealing__cooling__rounds": 0,
    "annealing__holding__rounds": 0,
    "data__partition__clients": 3,
    "clients__per_round": 3,
}
BRIEFLY_S = 4.0
ENGINES = [
    pytest.param(None, id="fake"),
    pytest.param(0, id="local"),
    pytest.param(-2, id="local-2"),
    pytest.param(1, id="ray-1", marks=pytest.mark.ray),
    pytest.param(2, id="ray-2", marks=pytest.mark.ray),
]


class Lent:
    """An engine that is open already and stays open: a start of Ray's actors takes seconds."""

    def __init__(self, engine: Engine, population: Population) -> None:
        self._population = population
        self.threads = getattr(engine, "_threads", None) is not None
        self.submit = engine.submit

    def open(self) -> Population:
        return self._population

    def close(self) -> None:
        """Leave it open."""


@pytest.fixture(params=ENGINES, scope="module")
def engine(request: pytest.FixtureRequest) -> Make:
    """Return a function that makes an engine by that name, not yet opened."""
    actors = request.param
    if actors is None:
        return lambda name, behaviour: FakeEngine(make_recipe(name=name), behaviour)
    if actors <= 0:
        count = {"runtime__client_actors": -actors} if actors else {}

        def local(name: str, behaviour: Behaviour) -> Engine:
            if actors < 0:
                # A thread cannot be ended: the tests would wait for it at their end.
                briefly = dict.fromkeys(behaviour.sleep_s, BRIEFLY_S)
                behaviour = replace(behaviour, sleep_s=briefly)
            return local_engine(make_recipe(name=name, **count), behaviour)

        return local
    request.getfixturevalue("ray_session")
    from rayfed_lora.engines.on_ray.engine import RayEngine

    def make(name: str, behaviour: Behaviour) -> Engine:
        recipe = make_recipe(name=name, runtime__client_actors=actors, **ACTOR)
        return RayEngine(recipe, FakeFactory(behaviour), note=pytest.fail)

    return make


@pytest.fixture(scope="module")
def opened(engine: Make) -> Iterator[Lent]:
    """An open engine without faults."""
    made = engine("without-faults", WITHOUT_FAULTS)
    try:
        yield Lent(made, made.open())
    finally:
        made.close()


@pytest.fixture(scope="module")
def faulty(engine: Make) -> Iterator[Lent]:
    """An open engine with the faults of `FAULTY`."""
    made = engine("faulty", FAULTY)
    try:
        yield Lent(made, made.open())
    finally:
        made.close()


def run(engine: Engine, recipe: Recipe, location: Path) -> tuple[dict[str, Any], StatusBoard]:
    board = StatusBoard(recipe.annealing.total_rounds)
    folder = RunFolder(location)
    summary = simulate(recipe, engine, folder, board, lambda: False, resume=False)
    return summary, board


def table(location: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(BytesIO(RunFolder(location).read(f"{name}.parquet")))


def test_opening_tells_the_sizes_and_closing_frees_what_was_taken(engine):
    # What ran before gives its CPUs back some time after it was closed.
    wait_until_no_cpu_is_held()
    made = engine("opened-and-closed", WITHOUT_FAULTS)
    try:
        population = made.open()
    finally:
        made.close()
    assert population.shape == SHAPE
    assert population.clients == 6
    assert population.examples == {"validation": 0, "test": 5}
    made.close()
    wait_until_no_cpu_is_held()


def wait_until_no_cpu_is_held() -> None:
    """Wait until all of Ray's CPUs are free; no Ray, no wait."""
    ray = sys.modules.get("ray")
    if not ray or not ray.is_initialized():
        return
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def test_the_first_tensors_are_the_head_or_in_a_full_round_all(opened):
    head = opened.submit(Initial("adapter")).result()
    assert list(head) == ["head"]
    np.testing.assert_array_equal(head["head"], initial("head"))
    assert list(opened.submit(Initial("full")).result()) == list(WEIGHTS)


def model(state: AdapterState = STATE, base: Base | None = None) -> GlobalModel:
    return GlobalModel(state, base or Base(), "adapter")


def training(*blocks: Block, plan: LocalPlan = PLAN, **settings: Any) -> Train:
    return Train(model(), plan, "factor-average", blocks, **settings)


def parts_of(running: Running[Trained]) -> list[Trained]:
    """Return the results of the parts as the round loop gets them."""
    return [part.result() for part in running.pending]


def mean_of(trained: Trained) -> AdapterState:
    """Return the aggregate of what came back."""
    step = OptimizerStep(ServerOptimizer())
    return RULES["factor-average"].aggregate(STATE, trained.means, step).state


def test_reports_come_one_a_client_in_client_order_and_their_updates_reduced(opened):
    task = training((0,), (1, 3), (4,), (5,))
    running = opened.submit(task)
    parts = parts_of(running)
    assert [[r.client for r in part.reports] for part in parts] == [[0], [1, 3], [4], [5]]
    assert running.reruns() == 0
    reports = [report for part in parts for report in part.reports]
    assert [report.examples for report in reports] == [1, 2, 4, 5, 6]
    assert all(report.error is None for report in reports)
    # The fake's step is client + round, here round 2, on every value; weights are the examples.
    moved = 2 + (1 * 0 + 2 * 1 + 4 * 3 + 5 * 4 + 6 * 5) / 18
    mean = mean_of(task.joined(parts))
    np.testing.assert_allclose(mean.factors["q"].a, np.full((2, 4), 1 + moved), rtol=1e-6)
    np.testing.assert_allclose(mean.factors["q"].b, np.full((6, 2), moved), rtol=1e-6)
    assert mean.factors["v"].a.shape == (0, 3)
    np.testing.assert_allclose(mean.dense["head"], initial("head") + moved, rtol=1e-6)


def test_the_results_of_many_parts_come_joined_and_nothing_is_lost(opened):
    task = training(*((k % 6,) for k in range(70)))
    parts = parts_of(opened.submit(task))
    # The means of 32 parts, 32 and the last 6: the round loop joins three.
    summed = [i for i, part in enumerate(parts) if part.means.tensors()]
    assert len(summed) == 3
    reports = [len(part.reports) for part in parts]
    assert [sum(reports[: i + 1]) for i in summed] == [32, 64, 70]
    assert [r.client for part in parts for r in part.reports] == [k % 6 for k in range(70)]
    weights = [k % 6 + 1 for k in range(70)]
    moved = 2 + sum(w * (w - 1) for w in weights) / sum(weights)
    mean = mean_of(task.joined(parts))
    np.testing.assert_allclose(mean.factors["q"].b, np.full((6, 2), moved), rtol=1e-6)


def test_an_evaluation_begun_before_a_training_gives_the_sums_of_its_own_state(opened):
    other = replace(STATE, dense={"head": initial("head") + 1})
    evaluation = opened.submit(Evaluate(model(), "test", (slice(0, 5),)))
    running = opened.submit(training(*((k,) for k in range(6))).on(model(other)))
    (sums,) = evaluation.result()
    assert len(running.result().reports) == 6
    wave = np.sin(energy(STATE, Base(), "adapter") + np.arange(5))
    np.testing.assert_allclose(sums.losses, 1 + 0.1 * wave, rtol=1e-6)


def test_training_leaves_the_state_it_was_given_as_it_is(opened):
    opened.submit(training((0, 1))).result()
    np.testing.assert_array_equal(STATE.factors["q"].a, 1)


def test_a_new_base_and_a_merge_reach_the_clients(opened):
    merged = {"q": np.ones((6, 4), np.float32)}
    weights = {name: initial(name) for name in WEIGHTS if name != "head"}
    moves = []
    for base in (Base(), Base(1, weights), Base(1, weights, 1, merged), Base()):
        trained = opened.submit(training((0,)).on(model(base=base))).result()
        moves.append(float(mean_of(trained).dense["head"][0, 0]))
    # Client 0 in round 2 moves by 2, and by an eighth more for each new base and merge.
    assert moves == [2.0, 2.125, 2.25, 2.0]


def test_a_state_that_follows_another_one_is_trained_from_its_own_values(opened):
    moves = []
    for shift in (0.0, 1.0, 0.0):
        state = replace(STATE, dense={"head": initial("head") + np.float32(shift)})
        trained = opened.submit(training((0,)).on(model(state))).result()
        moves.append(float(mean_of(trained).dense["head"][0, 0]))
    assert moves == [2.0, 3.0, 2.0]


def test_clients_are_tested_in_order_each_with_its_own_factors_where_it_has_some(opened):
    own = {
        m: np.full((s.d_out, 2 if m == "q" else 0), 3, np.float32) for m, s in SHAPE.modules.items()
    }
    found = opened.submit(TestClients(model(), ((4, 1), (0,)), personal={0: own})).result()
    personal = {n: replace(f, b=own[n]) for n, f in STATE.factors.items()}
    energies = [energy(STATE, Base(), "adapter")] * 2
    energies.append(energy(replace(STATE, factors=personal), Base(), "adapter"))
    assert [score.client for score in found] == [4, 1, 0]
    assert [score.loss for score in found] == energies
    assert energies[2] != energies[0]


def test_the_sums_of_shards_come_in_the_order_of_the_shards(opened):
    shards = (slice(0, 2), slice(2, 4), slice(4, 5))
    sums = opened.submit(Evaluate(model(), "test", shards)).result()
    # The fake's loss of row i is 1 + 0.1 sin(energy + i).
    wave = np.sin(energy(STATE, Base(), "adapter") + np.arange(5))
    expected = [2 + 0.1 * (wave[0] + wave[1]), 2 + 0.1 * (wave[2] + wave[3]), 1 + 0.1 * wave[4]]
    assert [len(part.labels) for part in sums] == [2, 2, 1]
    np.testing.assert_allclose([part.losses.sum() for part in sums], expected, rtol=1e-6)


def test_a_cancelled_training_begins_nothing_more_and_the_engine_goes_on(opened):
    running = opened.submit(training(*((k,) for k in range(6))))
    running.cancel()
    assert len(opened.submit(training((0,))).result().reports) == 1


def exported_energy(location: Path) -> float:
    return float(json.loads((location / "adapter" / "fake.json").read_text())["energy"])


def full_energy(moved: float) -> float:
    """Return the fake's energy of the source's weights with `moved` added to each."""
    dense = {name: initial(name) + np.float32(moved) for name in WEIGHTS}
    return energy(AdapterState({}, dense), Base(), "full")


def test_one_round_gives_the_weighted_mean_of_the_steps(opened, tmp_path):
    recipe = make_recipe(**ONE_STAGE, annealing__initiating__rounds=1)
    summary, _ = run(of_three_clients(opened), recipe, tmp_path)
    # Client k has k + 1 examples and moves by k in round 0: (1 * 0 + 2 * 1 + 3 * 2) / 6 = 4 / 3.
    assert exported_energy(tmp_path) == pytest.approx(full_energy(4 / 3), rel=1e-6)
    assert summary["final"]["train_loss"] == pytest.approx(4 / 3)
    (row,) = table(tmp_path, "rounds").to_dict("records")
    assert (row["clients"], row["failed_clients"]) == (3, 0)
    assert row["bytes_up"] == row["bytes_down"] == 3 * 47 * 4


def test_what_clients_remember_has_the_same_bits_on_every_engine(opened, tmp_path):
    recipe = make_recipe(method="scaffold")
    run(local_engine(recipe), recipe, tmp_path / "local")
    run(opened, make_recipe(method="scaffold", runtime__cohort_size=2), tmp_path / "run")
    expected, found = (
        checkpoints.newest(RunFolder(tmp_path / name), pytest.fail) for name in ("local", "run")
    )
    assert sorted(found.memory) == sorted(expected.memory)
    for client, own in expected.memory.items():
        for name, array in own.items():
            assert array.any()
            np.testing.assert_array_equal(found.memory[client][name], array)
    for name, array in expected.shared.items():
        np.testing.assert_array_equal(found.shared[name], array)
    hashes = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("local", "run")]
    assert hashes[0]["adapter_sha256"] == hashes[1]["adapter_sha256"]


def of_three_clients(lent: Lent) -> Lent:
    found = lent.open()
    devices = replace(found.devices, sizes=found.devices.sizes[:3])
    return Lent(lent, replace(found, clients=3, devices=devices))


@pytest.mark.parametrize("cohort_size", [1, 3, "auto"])
def test_a_whole_run_is_the_same_to_the_bit_on_every_engine(opened, cohort_size, tmp_path):
    alone = make_recipe(clients__per_round=5)
    expected, _ = run(local_engine(alone), alone, tmp_path / "local")
    recipe = make_recipe(clients__per_round=5, runtime__cohort_size=cohort_size)
    summary, _ = run(opened, recipe, tmp_path / "run")
    assert summary["adapter_sha256"] == expected["adapter_sha256"]
    assert summary["communication"] == expected["communication"]
    for name in ("rounds", "clients"):
        pd.testing.assert_frame_equal(
            table(tmp_path / "run", name).drop(columns="seconds"),
            table(tmp_path / "local", name).drop(columns="seconds"),
            check_exact=True,
        )


@pytest.mark.parametrize("cohort_size", [1, 3])
def test_encoded_and_attacked_updates_are_the_same_to_the_bit_on_every_engine(
    opened, cohort_size, tmp_path
):
    settings: dict[str, Any] = {
        "clients__per_round": 5,
        "wire": {"up": "int8", "down": "int8"},
        "clients__attack": {"name": "noise", "share": 0.4, "std": 0.1},
    }
    alone = make_recipe(**settings)
    expected, _ = run(local_engine(alone), alone, tmp_path / "local")
    recipe = make_recipe(**settings, runtime__cohort_size=cohort_size)
    summary, _ = run(opened, recipe, tmp_path / "run")
    assert summary["adapter_sha256"] == expected["adapter_sha256"]
    assert summary["communication"] == expected["communication"]


def test_a_failed_client_is_recorded_and_left_out_and_the_run_goes_on(faulty, tmp_path):
    recipe = make_recipe(**ONE_STAGE, annealing__initiating__rounds=2)
    summary, board = run(of_three_clients(faulty), recipe, tmp_path)
    # Without client 1: (1 * 0 + 3 * 2) / 4 = 3 / 2; in round 1 all: 1 + 4 / 3.
    assert exported_energy(tmp_path) == pytest.approx(full_energy(3 / 2 + 7 / 3), rel=1e-6)
    assert summary["failed_clients"] == 1
    assert any("client 1 failed: loss is nan" in note for note in board.status().notes)
    rounds, clients = table(tmp_path, "rounds"), table(tmp_path, "clients")
    assert rounds["failed_clients"].tolist() == [1, 0]
    assert rounds["train_loss"].tolist() == pytest.approx([3 / 2, 4 / 3])
    assert rounds["bytes_up"].tolist() == [2 * 47 * 4, 3 * 47 * 4]
    failed = clients[clients["status"] == "failed"].to_dict("records")
    assert [(row["round"], row["client"], row["bytes_up"]) for row in failed] == [(0, 1, 0)]
    assert failed[0]["error"] == "loss is nan in local step 1 of 1"


def test_a_round_in_which_every_client_fails_ends_the_run_and_says_why(faulty, tmp_path):
    recipe = make_recipe(**ONE_STAGE, annealing__initiating__rounds=5)
    with pytest.raises(RunError, match=r"round 4: none of 3 clients .* loss is nan in local step"):
        run(of_three_clients(faulty), recipe, tmp_path)
    assert (tmp_path / "checkpoints" / "round-000003" / "manifest.json").exists()


def test_a_client_that_raises_is_left_out_where_the_plan_says_so(faulty):
    plan = replace(PLAN, round=5, tolerant=True)
    trained = faulty.submit(training((0, 1, 2), (3,), plan=plan)).result()
    reports = trained.reports
    assert [report.client for report in reports] == [0, 1, 2, 3]
    assert [report.error for report in reports] == [
        None,
        "ValueError: the fake client 1 was told to raise",
        None,
        None,
    ]
    assert "_train_client" in reports[1].trace
    # Clients 0, 2 and 3 hold 1, 3 and 4 examples and move the head by 5, 7 and 8: none twice.
    head = trained.means.tensors()["head"] - STATE.dense["head"]
    np.testing.assert_allclose(head, (1 * 5 + 3 * 7 + 4 * 8) / 8, rtol=1e-6)


def test_a_client_that_raises_is_named_with_round_and_traceback_promptly(faulty):
    # Nobody waits for clients 4 and 5, which take two minutes each, or in threads long enough to
    # be seen. Last of those on `faulty`.
    began = time.perf_counter()
    plan = replace(PLAN, round=5)
    with pytest.raises(ClientError) as raised:
        parts_of(faulty.submit(training(*((k,) for k in (0, 1, 4, 5)), plan=plan)))
    limit_s = 0.5 * BRIEFLY_S if faulty.threads else 60.0
    assert time.perf_counter() - began < limit_s
    error = raised.value
    assert (error.client, error.round_index, error.exit_status) == (1, 5, 1)
    assert "ValueError: the fake client 1 was told to raise" in error.trace
    assert "_train_client" in error.trace
    assert str(error).startswith("client 1 failed in round 6:\n")
