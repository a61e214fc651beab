"""Own partitions: what they get, what they may return, and how they are chosen."""

from __future__ import annotations

import json

import numpy as np
import pytest

import rayfed_lora
from rayfed_lora.data.partition import deal
from rayfed_lora.errors import DataError, PluginError, RecipeError
from rayfed_lora.plugins import partition
from rayfed_lora.plugins.tables import PARTITIONS
from rayfed_lora.recipe.data import Partition
from tests.fakes import make_recipe

LABELS = np.array([2, 0, 1, 0, 2, 1, 0], dtype=np.int64)
pytestmark = pytest.mark.usefixtures("forgotten_methods")


def test_an_own_partition_gives_the_client_of_each_example_and_has_options():
    @partition()
    def in_turn(labels, clients, rng, *, first: int = 0):
        return (np.arange(len(labels)) + first) % clients

    chosen = Partition.model_validate({"kind": "in-turn", "clients": 3, "first": 1})
    table = deal(LABELS, chosen, seed=0)
    # Example i goes to client (i + 1) mod 3.
    assert [table.examples(k).tolist() for k in range(3)] == [[2, 5], [0, 3, 6], [1, 4]]
    with pytest.raises(ValueError, match="firsd"):
        Partition.model_validate({"kind": "in-turn", "firsd": 1})


def test_an_own_partition_may_list_the_examples_of_each_client_and_reads_the_sections_keys():
    @partition()
    def by_class(labels, clients, rng, *, alpha: float = 9.0):
        assert alpha == 0.25
        return [np.flatnonzero(labels == k) for k in range(clients)]

    table = deal(LABELS, Partition(kind="by-class", clients=3, alpha=0.25), seed=0)
    assert [table.examples(k).tolist() for k in range(3)] == [[1, 3, 6], [2, 5], [0, 4]]


def test_an_own_partition_draws_from_the_runs_seed():
    @partition()
    def drawn(labels, clients, rng):
        return rng.permutation(np.arange(len(labels)) % clients)

    chosen = Partition(kind="drawn", clients=2)
    first, again, other = (deal(LABELS, chosen, seed=s).order.tolist() for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("dealt", "message"),
    [
        ([0, 1, 2], r"2 clients, got 3"),
        (np.zeros(5, np.int64), r"client for 7 examples: int64 of shape \(5,\)"),
        (np.zeros(7), r"float64 of shape \(7,\)"),
        (np.full(7, 2), r"clients 0 to 1, got 2 to 2"),
        ([[0, 1, 2], [2, 3, 4, 5, 6]], r"exactly one client, got 8 places of 7 examples"),
        ([[0, 1, 2], [3, 4, 5]], r"exactly one client, got 6 places of 6 examples"),
        (np.zeros(7, np.int64), r"leaves 1 of 2 clients without an example"),
    ],
)
def test_what_an_own_partition_returns_is_checked(dealt, message):
    partition("odd")(lambda labels, clients, rng: dealt)
    with pytest.raises(DataError, match=message) as raised:
        deal(LABELS, Partition(kind="odd", clients=2), seed=0)
    assert "'odd'" in str(raised.value)


def test_a_built_in_name_of_a_partition_is_taken():
    with pytest.raises(RecipeError, match=r"data.partition.kind: expected 'iid'"):
        make_recipe(data__partition__kind="nothing")
    own = partition("iid")(lambda labels, clients, rng: labels)
    # An own method of a built-in name is known by its place; the built-in one stays.
    assert PARTITIONS["iid"] is not own
    with pytest.raises(PluginError, match="without a colon"):
        partition("a:b")(lambda labels, clients, rng: labels)


def test_a_run_with_an_own_partition_records_it_and_deals_by_it(tmp_path):
    @partition()
    def halves(labels, clients, rng, *, share: float = 0.5):
        """The first client gets a share of all examples."""
        owner = 1 + np.arange(len(labels)) % (clients - 1)
        owner[: int(share * len(labels))] = 0
        return owner

    recipe = rayfed_lora.Recipe.load("digits-vit").with_(
        {
            "data.max_examples": 100,
            "data.partition": {"kind": "halves", "clients": 5, "share": 0.6},
            "clients.per_round": 2,
            "clients.local_steps": 1,
            "annealing.mode": "fixed",
            "annealing.initiating.rounds": 0,
            "annealing.heating.rounds": 1,
            "annealing.cooling.rounds": 0,
            "annealing.holding.rounds": 0,
            "runtime.executor": "local",
        }
    )
    run = rayfed_lora.run(recipe, str(tmp_path / "a"))
    counts = _table(tmp_path / "a" / "partition.parquet").groupby("client")["examples"].sum()
    # 60 of 100 examples, then 40 in turn over 4 clients.
    assert counts.tolist() == [60, 10, 10, 10, 10]
    (recorded,) = json.loads((tmp_path / "a" / "plugins.json").read_text())[0]["methods"]
    assert (recorded["kind"], recorded["name"]) == ("partition", "halves")
    assert run.summary["rounds"] == 1


def _table(path):
    import pandas as pd

    return pd.read_parquet(path)
