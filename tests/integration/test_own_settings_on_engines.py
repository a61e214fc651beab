"""Settings that differ between clients give the same bits on any engine, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.engines.factory import TorchFactory
from rayfed_lora.launching.this_process import local_engine
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder

# Of the shipped recipe: a round of each kind, and two blocks a round.
SMALLER: dict[str, Any] = {
    # Of its clients some have batches of 4, and some of 8.
    "seed": 2,
    "data.partition.clients": 8,
    "data.max_examples": 240,
    "model.config.hidden_size": 16,
    "model.config.intermediate_size": 24,
    "annealing.initiating.rounds": 1,
    "annealing.heating.rounds": 1,
    "annealing.heating.rank": 4,
    "annealing.cooling.rounds": 1,
    "annealing.cooling.rank": 2,
    "annealing.holding.rounds": 0,
    "clients.per_round": 6,
    "clients.lr_schedule": {"shape": "linear", "final_factor": 0.5},
    "clients.accumulate": 2,
    "runtime.executor": "local",
    "runtime.client_actors": 1,
    "runtime.device": "cpu",
    "runtime.cohort_size": 3,
}
OWN: dict[str, Any] = {
    "clients.optimizer.lr": {"median": 0.05, "sigma": 0.5},
    "clients.local_steps": {"distribution": "uniform", "low": 1, "high": 4},
    "clients.batch_size": {"choices": [4, 8], "shares": [1, 1]},
}


def recipe(own: dict[str, Any] = OWN, **runtime: Any) -> rayfed_lora.Recipe:
    keys = {f"runtime.{key}": value for key, value in runtime.items()}
    return rayfed_lora.load_recipe("digits-vit", {**SMALLER, **own, **keys})


@pytest.fixture(scope="module")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> rayfed_lora.Result:
    return rayfed_lora.run(recipe(), out=str(tmp_path_factory.mktemp("own") / "one"))


def assert_same(one: rayfed_lora.Result, other: rayfed_lora.Result) -> None:
    assert one.summary["adapter_sha256"] == other.summary["adapter_sha256"]
    assert one.summary["communication"] == other.summary["communication"]
    for name in ("client", "train_loss", "lr", "local_steps", "batch_size"):
        np.testing.assert_array_equal(one.clients[name], other.clients[name], err_msg=name)


def test_each_setting_that_differs_changes_the_result(
    one_thread: rayfed_lora.Result, tmp_path: Path
) -> None:
    found = {one_thread.summary["adapter_sha256"]}
    for key in OWN:
        others = {name: value for name, value in OWN.items() if name != key}
        result = rayfed_lora.run(recipe(others), out=str(tmp_path / key))
        found.add(result.summary["adapter_sha256"])
    assert len(found) == 4
    clients = one_thread.clients
    assert set(clients["local_steps"]) <= {1, 2, 3, 4}
    assert set(clients["batch_size"]) == {4, 8}
    assert clients.groupby("client")["batch_size"].nunique().max() == 1


def test_threads_give_the_bits_of_one(one_thread: rayfed_lora.Result, tmp_path: Path) -> None:
    assert_same(one_thread, rayfed_lora.run(recipe(client_actors=2), out=str(tmp_path / "two")))


def test_a_stop_and_a_resume_give_the_bits_of_one_run(
    one_thread: rayfed_lora.Result, tmp_path: Path
) -> None:
    place, own = tmp_path / "resumed", recipe()
    board = StatusBoard(own.annealing.total_rounds)
    engine, folder = local_engine(own, TorchFactory(), "cpu"), RunFolder(str(place))
    rounds = simulate_rounds(own, engine, folder, board, lambda: False, resume=False)
    next(rounds)
    rounds.close()
    assert pd.read_parquet(place / "rounds.parquet")["round"].tolist() == [0]
    assert_same(one_thread, rayfed_lora.run(str(place), resume=True))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("actors", [1, 2])
def test_client_actors_give_the_bits_of_one_thread(
    one_thread: rayfed_lora.Result, tmp_path: Path, actors: int
) -> None:
    on_ray = recipe(executor="ray", client_actors=actors)
    assert_same(one_thread, rayfed_lora.run(on_ray, out=str(tmp_path / "ray")))
