"""The baseline without a federation: each client alone, from the common start, and nothing sent."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayfed_lora.errors import RecipeError
from rayfed_lora.federation import sampling
from rayfed_lora.lora.stacked import named
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.messages import TestClients
from rayfed_lora.tasks.training import Starts
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel
from tests.fakes import make_recipe
from tests.unit.test_methods import progresses
from tests.unit.test_session import run


def drawn(recipe: Recipe) -> list[tuple[int, ...]]:
    history = sampling.ClientHistory.empty(np.ones(6, np.int64))
    return [sampling.cohort(recipe, history, t) for t in range(recipe.annealing.total_rounds)]


def test_a_client_adds_up_its_own_rounds_from_the_common_start() -> None:
    runs, cohorts = progresses(method="local-only"), drawn(make_recipe(method="local-only"))
    start = named(runs[1].model.state)
    for before, after in pairwise(runs[1:]):
        # The common start stays: whoever begins later begins there too.
        for name, tensor in named(after.model.state).items():
            np.testing.assert_array_equal(tensor, start[name])
        assert before.personal.keys() <= after.personal.keys()
    assert sorted(runs[-1].personal) == sorted({k for cohort in cohorts for k in cohort})
    several = 0
    for client, own in runs[-1].personal.items():
        rounds = [t for t, cohort in enumerate(cohorts) if client in cohort]
        several += len(rounds) > 1
        assert set(own) == set(start)
        for name, tensor in own.items():
            # The fake adds client + round to every value.
            np.testing.assert_allclose(
                tensor, start[name] + sum(client + t for t in rounds), rtol=1e-5
            )
    assert several > 0


def test_a_client_is_tested_with_all_that_is_its_own() -> None:
    factors = {"q": Factors(np.ones((1, 2), np.float32), np.zeros((2, 1), np.float32), 2.0)}
    state = AdapterState(factors, {"head": np.zeros(2, np.float32)})
    own: dict[str, Any] = {
        "A of q": np.full((1, 2), 3, np.float32),
        "B of q": np.full((2, 1), 4, np.float32),
        "head": np.full(2, 5, np.float32),
    }
    task = TestClients(GlobalModel(state, Base(), "adapter"), ((0, 1),), personal={1: own})
    found = Starts(task).of(1)
    for name, tensor in named(found).items():
        np.testing.assert_array_equal(tensor, own[name])
    assert found.factors["q"].scale == 2.0
    assert Starts(task).of(0) is state


def test_nothing_is_billed_but_the_base_that_all_start_from(tmp_path: Path) -> None:
    recipe = make_recipe(method="local-only", evaluation__client_fraction=0.5)
    summary, _ = run(recipe, tmp_path)
    sent = summary["communication"]
    assert sent["bytes_up"] == sent["bytes_down"] == 0
    assert sent["bytes_base"] > 0
    assert sent["reduction_vs_fedavg"] == 1.0
    tests = pq.read_table(tmp_path / "client_metrics.parquet").to_pylist()
    # Their own models are not the common one, which clients that never took part keep.
    assert any(row["personal_loss"] not in (None, row["loss"]) for row in tests)


@pytest.mark.parametrize(
    ("settings", "path", "told"),
    [
        ({"annealing__mode": "staged"}, "annealing.mode", "sends nothing"),
        ({"clients__objective": "scaffold"}, "aggregation.rule", "trains each client alone"),
        ({"wire__up": "int8"}, "wire.up", ""),
    ],
)
def test_what_does_not_go_with_training_alone_is_rejected(
    settings: dict[str, Any], path: str, told: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        make_recipe(**{"method": "local-only", **settings})
    assert [told in str(fault) for fault in raised.value.faults if fault.path == path] == [True]


def test_a_run_whose_models_nobody_tests_is_told_of() -> None:
    (note,) = [n for n in unused(make_recipe(method="local-only")) if "local-only" in n]
    assert "evaluation.client_fraction" in note
    tested = make_recipe(method="local-only", evaluation__client_fraction=0.2)
    assert not [n for n in unused(tested) if "local-only" in n]
