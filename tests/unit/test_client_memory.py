"""What clients remember between rounds: by hand, on several engines, in checkpoints, and billed.

Under the fakes' SCAFFOLD a client's variate is the gradient of its last step: -step / lr.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.federation.ledger import Ledger
from rayfed_lora.federation.traffic import RoundFacts
from rayfed_lora.federation.transitions import Resizing
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints
from rayfed_lora.runs.checkpoints import CheckpointWriter, Snapshot
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import AdapterState, Base
from tests.fakes import SHAPE, WEIGHTS, Behaviour, Killed, KilledEngine, local_engine, make_recipe
from tests.unit.test_session import run, table

LR = 0.05
SCAFFOLD = {"method": "scaffold", "clients__optimizer__lr": LR}
# Of the cohorts (0, 1, 4), (1, 3, 5), (1, 3, 5), (2, 3, 4), (0, 1, 5), (0, 3, 5).
FAULTS = Behaviour(raising=frozenset({(3, 3), (3, 5)}), failing=frozenset({(0, 4), (0, 5)}))


def newest(location: Path) -> Snapshot:
    found = checkpoints.newest(RunFolder(location), pytest.fail)
    assert found is not None
    return found


def variates(rows: pd.DataFrame) -> dict[int, float]:
    """Return each client's variate by hand, from the rounds in which its update was used."""
    used = rows[rows.status == "ok"]
    return {int(k): -(k + t) / LR for k, t in used.groupby("client")["round"].max().items()}


def assert_remembered(location: Path) -> Snapshot:
    found, expected = newest(location), variates(table(location, "clients"))
    assert sorted(found.memory) == sorted(expected)
    for client, value in expected.items():
        assert set(found.memory[client]) == set(WEIGHTS)
        for name, array in found.memory[client].items():
            want = np.full(WEIGHTS[name], value)
            np.testing.assert_allclose(array, want, rtol=1e-4, atol=1e-3)
    # c is the sum of all changes by N: the mean of all six variates, 0 where there is none.
    for array in found.shared.values():
        np.testing.assert_allclose(array, sum(expected.values()) / 6, rtol=1e-4, atol=1e-3)
    return found


def assert_same(one: Snapshot, other: Snapshot) -> None:
    assert sorted(one.memory) == sorted(other.memory)
    for client, own in one.memory.items():
        for name, array in own.items():
            assert array.tobytes() == other.memory[client][name].tobytes()
    for name, array in one.shared.items():
        assert array.tobytes() == other.shared[name].tobytes()


def played(location: Path, engine: Any = None, **settings: Any) -> Snapshot:
    run(make_recipe(**SCAFFOLD, **settings), location, engine=engine)
    return assert_remembered(location)


def test_a_client_keeps_what_it_last_returned_and_a_failed_one_the_old_value(tmp_path):
    recipe = make_recipe(**SCAFFOLD, clients__max_failed=1)
    found = played(tmp_path, local_engine(recipe, FAULTS), clients__max_failed=1)
    # Client 3 was last used in round 2, client 0 in round 0: -(3 + 2) / lr and -(0 + 0) / lr.
    np.testing.assert_allclose(found.memory[3]["head"], -5 / LR, rtol=1e-4)
    np.testing.assert_allclose(found.memory[0]["head"], 0.0, atol=1e-3)


def test_late_clients_keep_what_they_had(tmp_path):
    clock = {"clients__over_select": 2.0, "clients__speed": {"median": 2.0, "sigma": 0.5}}
    played(tmp_path, **clock)
    assert (table(tmp_path, "clients").status == "late").any()


@pytest.mark.parametrize("size", [1, 2, "auto"])
def test_threads_and_halves_remember_the_same_to_the_bit(tmp_path, size):
    expected = played(tmp_path / "local")
    threads = {"runtime__client_actors": 2, "runtime__cohort_size": size}
    engine = local_engine(make_recipe(**SCAFFOLD, **threads))
    assert_same(played(tmp_path / "threads", engine, **threads), expected)
    memory_short = local_engine(make_recipe(**SCAFFOLD), Behaviour(together=1))
    assert isinstance(memory_short, LocalEngine)
    adapter = {"annealing__mode": "fixed", "runtime__cohort_size": 3}
    halved = played_adapter(tmp_path / "halved", memory_short, **adapter)
    assert_same(halved, played_adapter(tmp_path / "whole", None, **adapter))


def played_adapter(location: Path, engine: Any, **settings: Any) -> Snapshot:
    run(make_recipe(clients__objective="scaffold", **settings), location, engine=engine)
    found = newest(location)
    assert found.memory
    return found


@pytest.mark.parametrize("t", [1, 3, 5])
def test_a_killed_run_goes_on_with_what_clients_remembered(tmp_path, t):
    expected = played(tmp_path / "whole")
    recipe = make_recipe(**SCAFFOLD)
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", engine=KilledEngine(recipe, t, 1))
    run(recipe, tmp_path / "killed", resume=True)
    assert_same(assert_remembered(tmp_path / "killed"), expected)


def snapshot(rounds: int, memory: dict[int, Any]) -> Snapshot:
    return Snapshot(rounds, AdapterState({}, {}), Base(), {}, {}, memory=memory)


def pieces(folder: RunFolder) -> dict[str, int]:
    names = [name for name in folder.names("checkpoints") if name.startswith("memory-")]
    return {name: len(folder.read(f"checkpoints/{name}")) for name in names}


def test_a_checkpoint_writes_the_memory_of_those_that_changed_and_old_pieces_go(tmp_path):
    folder = RunFolder(tmp_path)
    writer = CheckpointWriter(folder, keep=2)
    memory = {k: {"w": np.full(100, k, np.float32)} for k in range(20)}
    writer.write(snapshot(1, memory))
    for t in range(2, 40):
        changed = t % 20
        memory = {**memory, changed: {"w": np.full(100, 1000 + t, np.float32)}}
        writer.write(snapshot(t, memory))
        sizes = pieces(folder)
        # All clients take 8,000 bytes, one 400 and the names; a twentieth is written each round,
        # and never more kept than the two checkpoints' double.
        assert sizes[f"memory-{t:06d}.safetensors"] < 600 or t == 22
        assert sum(sizes.values()) < 2 * 2 * 8_000 + 20 * 600
        found = newest(tmp_path)
        assert sorted(found.memory) == list(range(20))
        for k, own in memory.items():
            np.testing.assert_array_equal(found.memory[k]["w"], own["w"])
    # 20 + 20 entries are twice those there are: the 22nd checkpoint wrote one piece of all.
    assert min(pieces(folder)) == "memory-000022.safetensors"


def test_memory_that_began_anew_leaves_nothing_of_before(tmp_path):
    writer = CheckpointWriter(RunFolder(tmp_path), keep=1)
    one = {"w": np.ones(3, np.float32)}
    writer.write(snapshot(1, {0: one, 1: one}))
    writer.write(snapshot(2, {1: {"v": np.zeros(2, np.float32)}}))
    found = newest(tmp_path)
    assert {k: list(own) for k, own in found.memory.items()} == {1: ["v"]}
    assert list(pieces(RunFolder(tmp_path))) == ["memory-000002.safetensors"]


def test_single_numbers_come_back_without_a_dimension(tmp_path):
    one = np.array(0.5, np.float32)
    taken = replace(snapshot(1, {3: {"seen": one}}), shared={"mean": one})
    CheckpointWriter(RunFolder(tmp_path), keep=1).write(taken)
    found = newest(tmp_path)
    assert found.memory[3]["seen"].shape == found.shared["mean"].shape == ()
    assert found.memory[3]["seen"] == found.shared["mean"] == np.float32(0.5)


def test_damaged_memory_makes_a_checkpoint_damaged(tmp_path):
    folder, writer = RunFolder(tmp_path), CheckpointWriter(RunFolder(tmp_path), keep=3)
    own = {0: {"w": np.ones(3, np.float32)}}
    writer.write(snapshot(1, own))
    writer.write(snapshot(2, {**own, 1: {"w": np.zeros(3, np.float32)}}))
    folder.write("checkpoints/memory-000002.safetensors", b"spoilt")
    told: list[str] = []
    found = checkpoints.newest(folder, told.append)
    assert found is not None and found.rounds == 1 and list(found.memory) == [0]
    assert "memory-000002.safetensors does not match its checksum" in told[0]


def bill_of(objective: str, facts: RoundFacts) -> tuple[int, int, int]:
    rule = RULES["factor-average"]
    bill = Ledger(SHAPE, 6, rule, OBJECTIVES[objective]).book(facts)
    return bill.params_up, bill.params_down, bill.fedavg


def test_scaffold_doubles_what_is_sent_both_ways():
    arrived = np.array([True, True, False])
    full = RoundFacts("full", (0, 1, 2), arrived)
    # The model has 47 values; the third client sends nothing. FedAvg's bill stays as it is.
    assert bill_of("none", full) == (2 * 47, 3 * 47, 5 * 47)
    assert bill_of("scaffold", full) == (2 * 2 * 47, 2 * 3 * 47, 5 * 47)
    ranks = {"q": 3, "v": 3}
    adapter = RoundFacts("adapter", (0, 1, 2), arrived, Resizing(ranks))
    # q has 4 + 6 values a rank, v 3 + 4, the head 6: 3 * 17 + 6 = 57; B alone 3 * 10 + 6 = 36.
    assert bill_of("scaffold", adapter)[:2] == (2 * 2 * 57, 2 * 3 * 57)
    frozen = RoundFacts("adapter", (0, 1, 2), arrived, Resizing(ranks), frozen="a")
    rule = RULES["freeze-a"]
    bill = Ledger(SHAPE, 6, rule, OBJECTIVES["scaffold"]).book(frozen)
    assert (bill.params_up, bill.params_down) == (2 * 2 * 36, 2 * 3 * 36)


def test_a_run_is_billed_what_its_clients_returned(tmp_path):
    recipe: Recipe = make_recipe(**SCAFFOLD)
    run(recipe, tmp_path)
    rounds = table(tmp_path, "rounds")
    # Three clients, 47 values of the model and 47 of the variates, 4 bytes each.
    assert rounds.bytes_up.tolist() == [3 * 2 * 47 * 4] * 6
    assert rounds.bytes_down.tolist() == [3 * 2 * 47 * 4] * 6
