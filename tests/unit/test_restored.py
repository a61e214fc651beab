"""A checkpoint that does not belong to the run is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rayfed_lora.errors import RunFolderError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints, restored
from rayfed_lora.runs.checkpoints import Snapshot
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Population
from rayfed_lora.types import AdapterState, Factors
from tests.fakes import SHAPE, local_engine, make_recipe

POPULATION = Population(SHAPE, clients=6, examples={"test": 5})


def begun(folder: RunFolder, recipe: Recipe, rounds: int) -> None:
    board = StatusBoard(recipe.annealing.total_rounds)
    going = simulate_rounds(recipe, local_engine(recipe), folder, board, lambda: False, resume=True)
    for tables in going:
        if tables.rounds.num_rows == rounds:
            going.close()


@pytest.fixture(params=[1, 2], ids=["full model", "adapter"])
def snapshot(request: pytest.FixtureRequest, tmp_path: Any) -> Snapshot:
    folder = RunFolder(tmp_path)
    begun(folder, make_recipe(), request.param)
    found = checkpoints.newest(folder, lambda text: None)
    assert found is not None
    return found


def test_the_runs_own_checkpoint_fits(snapshot):
    restored.check(snapshot, make_recipe(), POPULATION)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", -1),
        ("rank", "2"),
        ("trainable", "all"),
        ("timing", {"wall_s": "long"}),
        ("ledger", []),
        ("scales", {"q": 0.0}),
        ("base_root", 2**80),
    ],
)
def test_a_fact_of_another_kind_is_refused(snapshot, key, value):
    with pytest.raises(ValueError, match=key):
        restored.check(
            replace(snapshot, facts={**snapshot.facts, key: value}), make_recipe(), POPULATION
        )


def test_a_missing_fact_is_refused(snapshot):
    facts = {key: value for key, value in snapshot.facts.items() if key != "ledger"}
    with pytest.raises(ValueError, match="ledger"):
        restored.check(replace(snapshot, facts=facts), make_recipe(), POPULATION)


def test_another_number_of_clients_is_refused(snapshot):
    with pytest.raises(ValueError, match=r"held base: expected shape \(7,\), got int64 of \(6,\)"):
        restored.check(snapshot, make_recipe(), replace(POPULATION, clients=7))


def test_factors_of_other_modules_or_shapes_are_refused(snapshot):
    zeros = Factors(np.zeros((3, 4), np.float32), np.zeros((5, 3), np.float32), 2.0)
    for factors, complaint in (
        ({"other": zeros}, "expected factors of"),
        ({"q": zeros, "v": zeros}, "B of q: expected shape|expected factors of nothing"),
    ):
        state = AdapterState(factors, snapshot.state.dense)
        with pytest.raises(ValueError, match=complaint):
            restored.check(replace(snapshot, state=state), make_recipe(), POPULATION)


def test_tensors_of_another_size_are_refused(snapshot):
    dense = {name: tensor[:1] for name, tensor in snapshot.state.dense.items()}
    state = AdapterState(snapshot.state.factors, dense)
    with pytest.raises(ValueError, match=r"tensors: expected (6|47) values in all, got \d+"):
        restored.check(replace(snapshot, state=state), make_recipe(), POPULATION)


@pytest.mark.parametrize(
    ("client", "names", "rows", "complaint"),
    [
        (6, "qv", 6, "own factors: expected clients 0 to 5, got 6"),
        (2, "q", 6, "expected own factors of client 2 of q, v, got q"),
        (2, "qv", 5, r"own q of client 2: expected shape \(6, 3\)"),
    ],
)
def test_own_factors_of_no_client_or_of_another_shape_are_refused(
    client, names, rows, complaint, tmp_path
):
    folder = RunFolder(tmp_path)
    begun(folder, make_recipe(), 2)
    found = checkpoints.newest(folder, lambda text: None)
    assert found is not None
    sizes = {"q": rows, "v": 4}
    own = {name: np.zeros((sizes[name], 3), np.float32) for name in names}
    with pytest.raises(ValueError, match=complaint):
        restored.check(replace(found, personal={client: own}), make_recipe(), POPULATION)


def test_a_run_whose_data_have_other_clients_now_is_refused_in_a_line(tmp_path):
    folder = RunFolder(tmp_path)
    begun(folder, make_recipe(), 2)
    more = make_recipe(data__partition__clients=7)
    going = simulate_rounds(
        more, local_engine(more), folder, StatusBoard(6), lambda: False, resume=True
    )
    with pytest.raises(RunFolderError, match="cannot go on from the checkpoint of round 2"):
        next(going)
