"""Settings of local training that differ between clients, against each client's training alone."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayfed_lora.data.client_numbers import ClientSettings
from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.data.dataset import Dataset, number_column
from rayfed_lora.errors import DataError, RecipeError, RunError
from rayfed_lora.federation.bills import Bill
from rayfed_lora.federation.learning_rate import learning_rate
from rayfed_lora.federation.simulated_clock import SimulatedClock
from rayfed_lora.launching.planning import plan
from rayfed_lora.objectives.objective import LocalStep
from rayfed_lora.plugins.optimizers import optimizer
from rayfed_lora.plugins.tables import OPTIMIZERS
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.training import preparing
from rayfed_lora.training.rehearsal import batch_sizes
from rayfed_lora.types import DeviceFacts, LocalSettings
from tests import fakes
from tests.tasks import local_plan, train
from tests.unit.test_session import run
from tests.unit.test_trainer import (
    adapter_state,
    assert_close,
    assert_same_bits,
    image_trainer,
    largest_difference,
    make_recipe,
)

SIZES = np.array([10, 20, 30, 40, 50, 60])
# Client 1 has 12 examples, client 2 has 8, client 4 has 7.
OWN = {
    1: LocalSettings(lr=0.2, steps=2, batch_size=3),
    2: LocalSettings(lr=0.05, steps=4, batch_size=8),
    4: LocalSettings(lr=0.1, steps=1, batch_size=5),
}


@pytest.mark.parametrize(
    "chosen",
    [
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"name": "adamw", "weight_decay": 0.3},
        # Its state depends on the learning rate.
        {"name": "rprop"},
    ],
    ids=str,
)
def test_a_block_of_different_clients_gives_each_what_a_recipe_of_its_settings_gives(
    chosen: dict[str, Any],
) -> None:
    values = {f"clients__optimizer__{key}": value for key, value in chosen.items()}
    # Micro-batches have as many examples as the largest batch.
    trainer = image_trainer(make_recipe(clients__batch_size={"choices": [8]}, **values))
    state = adapter_state(trainer)
    together = train(trainer, [1, 2, 4], state, local_plan(own=OWN))
    for update in together:
        own = OWN[update.client]
        like_that = image_trainer(
            make_recipe(
                clients__local_steps=own.steps, clients__batch_size=own.batch_size, **values
            )
        )
        (alone,) = train(like_that, [update.client], state, local_plan(lr=own.lr))
        assert update.steps == own.steps
        assert_close(update.state, alone.state)
        # Trained alone with settings of its own, a client has the very bits.
        (single,) = train(trainer, [update.client], state, local_plan(own=OWN))
        assert_same_bits(single.state, alone.state)
    assert largest_difference(together[0].state, together[1].state) > 1e-3


def test_a_step_accumulates_over_batches_of_the_clients_own_size() -> None:
    """Client 1, of 12 examples: two micro-batches of its own 3 are one batch of 6."""
    spread, own = {"choices": [8]}, {1: OWN[1], 2: OWN[2]}
    twice = image_trainer(make_recipe(clients__batch_size=spread, clients__accumulate=2))
    state = adapter_state(twice)
    together = train(twice, [1, 2], state, local_plan(own=own))
    like_that = image_trainer(make_recipe(clients__local_steps=2, clients__batch_size=6))
    (alone,) = train(like_that, [1], state, local_plan(lr=0.2))
    assert_close(together[0].state, alone.state)
    once = image_trainer(make_recipe(clients__batch_size=spread))
    (without,) = train(once, [1], state, local_plan(own=own))
    assert largest_difference(without.state, alone.state) > 1e-3


@pytest.mark.parametrize(
    ("steps", "sizes", "accumulate", "smallest", "largest"),
    [
        # Steps of 3, 4 and 2 examples; at most 4 at once.
        (1, [3, 4, 2], 1, 2, 4),
        # Steps of 6, 7 (of its 7 examples) and 4; in micro-batches of at most 4: 4 + 2, 4 + 3, 4.
        (1, [3, 4, 2], 2, 2, 4),
        # Epochs: 10 = 3 + 3 + 3 + 1.
        (None, [3, 4, 2], 1, 1, 4),
        # 10 = 6 + 4, 7 = 7, 8 = 4 + 4; the first one's 6 are 4 + 2.
        (None, [3, 4, 2], 2, 2, 4),
    ],
)
def test_the_smallest_and_the_largest_micro_batch_are_those_of_the_clients_own_sizes(
    steps: int | None, sizes: list[int], accumulate: int, smallest: int, largest: int
) -> None:
    settings = ClientSettings(0.1, steps, np.array(sizes), accumulate)
    assert batch_sizes(np.array([10, 7, 8]), settings) == (smallest, largest)


def test_rates_that_differ_only_in_other_clients_change_no_bit_of_a_client() -> None:
    trainer = image_trainer(make_recipe())
    state = adapter_state(trainer)
    plain = train(trainer, [1, 2, 4], state, local_plan(lr=0.1))
    own = {1: LocalSettings(lr=0.3)}
    mixed = train(trainer, [1, 2, 4], state, local_plan(lr=0.1, own=own))
    assert largest_difference(mixed[0].state, plain[0].state) > 1e-3
    for one, other in zip(mixed[1:], plain[1:], strict=True):
        assert_same_bits(one.state, other.state)


def test_an_optimiser_that_replaces_its_parameters_is_rejected_where_rates_differ() -> None:
    @optimizer("replacing")
    def replacing(parameters: Any, lr: float) -> Any:
        """Put other tensors in the place of the parameters."""

        class Replacing(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                for group in self.param_groups:
                    for p in group["params"]:
                        p.data = p.data - lr * p.grad

        return Replacing(parameters, lr=lr)

    try:
        trainer = image_trainer(make_recipe(clients__optimizer__name="replacing"))
        with pytest.raises(RunError, match="expected an optimiser that changes parameters in"):
            train(trainer, [1, 2], adapter_state(trainer), local_plan(own=OWN))
    finally:
        OPTIMIZERS.remove("replacing")


def step_of(*rates: float) -> LocalStep:
    none: Any = MappingProxyType({})
    return LocalStep(none, none, none, none, none, rates, 0)


def test_a_hook_gets_one_rate_only_where_there_is_one() -> None:
    assert step_of(0.1, 0.1).lr == 0.1
    with pytest.raises(RunError, match="use local\\.rates"):
        _ = step_of(0.1, 0.2).lr


def settings_of(sizes: np.ndarray = SIZES, **overrides: Any) -> ClientSettings:
    return ClientSettings.of(fakes.make_recipe(**overrides), DeviceFacts(sizes))


def test_numbers_follow_from_the_seed_and_have_the_distribution_that_is_asked_for() -> None:
    many = np.full(4000, 100)
    lr = {"distribution": "lognormal", "median": 0.1, "sigma": 0.5}
    steps = {"distribution": "uniform", "low": 2, "high": 4}
    size = {"choices": [4, 16], "shares": [3, 1]}
    asked = {
        "clients__optimizer__lr": lr,
        "clients__local_steps": steps,
        "clients__batch_size": size,
    }
    found = settings_of(many, **asked)
    assert np.median(found.lr) == pytest.approx(0.1, rel=0.05)
    assert np.std(np.log(found.lr)) == pytest.approx(0.5, rel=0.05)
    # Each of 2, 3 and 4 with a third of the clients: 1333, give or take four deviations of 30.
    assert found.steps is not None
    assert np.bincount(found.steps)[2:] == pytest.approx([4000 / 3] * 3, abs=120)
    assert set(np.unique(found.batch_size)) == {4, 16}
    assert np.mean(found.batch_size == 4) == pytest.approx(0.75, abs=0.03)
    again, other = settings_of(many, **asked), settings_of(many, seed=1, **asked)
    assert (again.lr == found.lr).all() and (other.lr != found.lr).all()
    # A setting is not drawn from the stream of another one.
    alone = settings_of(many, clients__batch_size=size)
    assert (alone.batch_size == found.batch_size).all()


def test_a_batch_has_no_more_examples_than_the_client_and_a_step_is_one_at_least() -> None:
    found = settings_of(
        clients__local_steps={"median": 0.2, "sigma": 0.1}, clients__batch_size={"choices": [32]}
    )
    assert np.asarray(found.steps).tolist() == [1] * 6
    assert np.asarray(found.batch_size).tolist() == [10, 20, 30, 32, 32, 32]


def test_the_simulated_clock_uses_each_clients_own_steps_and_batches() -> None:
    recipe = fakes.make_recipe(
        clients__per_round=6,
        clients__speed=1.0,
        clients__local_steps={"column": "steps"},
        clients__batch_size={"column": "batch"},
    )
    columns = {
        "steps": np.array([1.0, 2, 3, 4, 5, 6]),
        "batch": np.array([16.0, 16, 8, 8, 4, 4]),
    }
    clock = SimulatedClock(recipe, DeviceFacts(SIZES, columns))
    nothing = np.zeros(6, np.int64)
    bill = Bill(nothing, nothing, nothing, arrived=6)
    found = clock.turnout(0, tuple(range(6)), bill, full=False, now=0.0)
    # Steps times examples a step, at one a second; client 0 has 10 examples only.
    assert found.seconds.tolist() == [10, 32, 24, 32, 20, 24]
    twice = recipe.with_({"clients.accumulate": 2})
    found = SimulatedClock(twice, DeviceFacts(SIZES, columns)).turnout(
        0, tuple(range(6)), bill, full=False, now=0.0
    )
    # Client 1 has 20 examples for steps of 32.
    assert found.seconds.tolist() == [10, 40, 48, 64, 40, 48]


def test_the_schedule_multiplies_each_clients_rate_and_a_stages_rate_replaces_it() -> None:
    recipe = fakes.make_recipe(
        annealing__initiating__lr=0.4,
        clients__optimizer__lr={"choices": [0.1, 0.2]},
        clients__lr_schedule={"shape": "linear", "final_factor": 0.5},
    )
    # As for numbers: factors 1, 0.9, ..., the first round is the initiating one.
    assert learning_rate(recipe, 0, 0.2) == pytest.approx(0.4)
    assert learning_rate(recipe, 1, 0.2) == pytest.approx(0.18)
    with pytest.raises(ValueError, match="they differ"):
        learning_rate(recipe, 1)


def columns_of(rates: list[float], counts: list[float]) -> Any:
    """Return the columns of clients bob (rows 2 and 3) and mia (rows 0 and 1)."""
    recipe = fakes.make_recipe(
        data__partition={"kind": "column", "column": "who"},
        clients__per_round=2,
        clients__optimizer__lr={"column": "rate"},
        clients__local_steps={"column": "count"},
    )
    train = pa.table(
        {
            "client": ["mia", "mia", "bob", "bob"],
            number_column("rate"): rates,
            number_column("count"): counts,
        }
    )
    dataset = Dataset(train, None, train, ("0", "1"), clients=("bob", "mia"))
    table = ClientTable(np.array([2, 3, 0, 1]), np.array([0, 2, 4]))
    found, _ = preparing._devices(recipe, dataset, table)
    return ClientSettings.of(recipe, DeviceFacts(table.counts, found))


def test_a_column_gives_each_client_its_value_and_no_mean_of_it() -> None:
    found = columns_of([0.1, 0.1, 0.7, 0.7], [2, 2, 3, 3])
    assert found.lr.tolist() == [0.7, 0.1]
    assert found.steps.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("rates", "counts", "told"),
    [
        (
            [0.1, 0.1, 0.2, 0.3],
            [2, 2, 3, 3],
            "clients.optimizer.lr: column 'rate': expected one value in all examples of a client,"
            " got 0.2 and 0.3 for client 0 ('bob')",
        ),
        (
            [0.1, 0.1, 0.2, 0.2],
            [2.5, 2.5, 3, 3],
            "clients.local_steps: column 'count': expected whole numbers, got 2.5 for client 1"
            " ('mia')",
        ),
    ],
)
def test_a_column_without_one_whole_value_a_client_is_rejected(
    rates: list[float], counts: list[float], told: str
) -> None:
    with pytest.raises(DataError, match=re.escape(told)):
        columns_of(rates, counts)


@pytest.mark.parametrize(
    ("settings", "path", "told"),
    [
        ({"clients.local_steps": {"choices": [1, 2.5]}}, "clients.local_steps.choices", "2.5"),
        (
            {"clients.batch_size": {"distribution": "uniform", "low": 1.5, "high": 3}},
            "clients.batch_size.low",
            "expected whole numbers, got 1.5",
        ),
        (
            {"clients.optimizer.lr": {"choices": [0.1, 0.2], "shares": [1]}},
            "clients.optimizer.lr.shares",
            "expected a share for each of the 2 choices, got 1",
        ),
        ({"clients.optimizer.lr": {}}, "clients.optimizer.lr", "expects median, or choices or"),
        ({"clients.optimizer.lr": {"mediam": 1}}, "clients.optimizer.lr.mediam", "unknown key"),
        ({"clients.batch_size": 0}, "clients.batch_size", "expected greater than or equal to 1"),
        ({"clients.local_steps": {"median": 3}, "clients.local_epochs": 1}, None, "got both"),
    ],
)
def test_settings_that_cannot_be_are_rejected_at_their_key(
    settings: dict[str, Any], path: str | None, told: str
) -> None:
    with pytest.raises(RecipeError) as raised:
        fakes.make_recipe(**{key.replace(".", "__"): value for key, value in settings.items()})
    (fault,) = raised.value.faults
    assert told in str(fault)
    assert path in (None, fault.path)


OWN_KEYS: dict[str, Any] = {
    "clients__optimizer__lr": {"distribution": "uniform", "low": 0.1, "high": 0.2},
    "clients__batch_size": {"choices": [1, 2]},
}


def test_the_table_of_clients_has_the_settings_that_differ_and_no_others(tmp_path: Path) -> None:
    tables = {}
    for name, values in {"own": OWN_KEYS, "plain": {}}.items():
        recipe = fakes.make_recipe(clients__lr_schedule={"warmup_rounds": 1}, **values)
        run(recipe, tmp_path / name)
        tables[name] = pq.read_table(tmp_path / name / "clients.parquet")
        assert load_recipe(str(tmp_path / name / "recipe.yaml")) == recipe
    plain, own = tables["plain"].column_names, tables["own"].column_names
    assert own == [*plain, "lr", "batch_size"]
    # Client k of the fakes holds k + 1 examples.
    settings = settings_of(np.arange(1, 7), **OWN_KEYS)
    for row in tables["own"].to_pylist():
        # The warm-up of one round halves the rate.
        factor = 0.5 if row["round"] == 0 else 1.0
        assert row["lr"] == pytest.approx(settings.own["lr"][row["client"]] * factor)
        assert row["batch_size"] == settings.own["batch_size"][row["client"]]


def test_a_plan_tells_the_range_of_what_differs() -> None:
    found = plan(load_recipe("digits-vit", {"clients.local_steps": {"choices": [2, 7]}}))
    (line,) = [need for need in found.needs if "own settings" in need]
    assert "clients.local_steps 2 to 7" in line
    assert not [n for n in plan("digits-vit").needs if "own settings" in n]


def test_the_memory_of_a_plan_is_that_of_the_largest_batch() -> None:
    own = load_recipe("digits-vit", {"clients.batch_size": {"choices": [4, 8]}})
    largest = load_recipe("digits-vit", {"clients.batch_size": 8})
    assert len(plan(own).memory) > 0
    assert plan(own).memory == plan(largest).memory
