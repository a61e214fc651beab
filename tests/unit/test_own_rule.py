"""A new rule is one file and one entry of the table: `tests/half_way.py`, end to end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import rayfed_lora
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import RecipeError
from rayfed_lora.federation.run import fresh
from rayfed_lora.federation.server import Server
from rayfed_lora.plugins.registry import method_of
from rayfed_lora.recipe.loading import load_recipe, recipe_schema, recipe_yaml
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml
from tests import half_way
from tests.fakes import FakeFactory, initial, local_engine, make_recipe
from tests.unit.test_methods import Silent

HALF_WAY = method_of(half_way.half_way)
assert HALF_WAY is not None
# The tests here decide when it is in the table.
RULES.remove("half-way")


@pytest.fixture
def rule() -> Iterator[None]:
    HALF_WAY.again(HALF_WAY.target)
    yield
    RULES.remove("half-way")


def own_recipe() -> Recipe:
    """Return a run of two adapter rounds of rank 3 in which all six clients take part."""
    return make_recipe(
        aggregation__rule="half-way",
        annealing={
            "mode": "fixed",
            "initiating": {"rounds": 0},
            "heating": {"rounds": 2, "rank": 3},
            "cooling": {"rounds": 0},
            "holding": {"rounds": 0},
        },
        clients__per_round=6,
    )


@pytest.mark.usefixtures("rule")
def test_a_recipe_names_the_rule_keeps_it_and_the_schema_lists_it():
    recipe = own_recipe()
    assert load_recipe(parse_yaml("again", recipe_yaml(recipe))) == recipe
    assert "half-way" in recipe_schema()["$defs"]["Aggregation"]["properties"]["rule"]["enum"]


def test_a_rule_that_is_not_in_the_table_is_a_fault_that_lists_those_that_are():
    with pytest.raises(RecipeError) as raised:
        own_recipe()
    (fault,) = raised.value.faults
    assert fault.path == "aggregation.rule"
    *first, last = map(repr, RULES)
    assert fault.expected == f"expected {', '.join(first)} or {last}"


@pytest.mark.usefixtures("rule")
def test_settings_that_the_facts_of_the_rule_exclude_are_conflicts():
    with pytest.raises(RecipeError, match="'adam' steps along A and B, rule 'half-way'"):
        make_recipe(aggregation__rule="half-way", aggregation__server_optimizer__name="adam")
    with pytest.raises(RecipeError, match="rule 'half-way' averages factors of the round's rank"):
        make_recipe(aggregation__rule="half-way", clients__ranks=1)


@pytest.mark.usefixtures("rule")
def test_the_rule_aggregates_each_round_of_a_run():
    recipe = own_recipe()
    engine = local_engine(recipe)
    population = engine.open()
    server = Server(recipe, engine, population, Silent(), lambda: False)
    first, second = server.rounds(fresh(recipe, engine, population))
    # Client k has weight k + 1 and adds k + t to every value: sum (k + 1) (k + t) / 21 = 70/21 + t.
    moves = (70 / 21 / 2, (70 / 21 + 1) / 2)
    head = initial("head")
    np.testing.assert_allclose(first.model.state.dense["head"], head + moves[0], rtol=1e-6)
    np.testing.assert_allclose(second.model.state.dense["head"], head + sum(moves), rtol=1e-6)
    # B starts at 0.
    b = second.model.state.factors["q"].b
    np.testing.assert_allclose(b, np.full((6, 3), sum(moves)), rtol=1e-6)


@pytest.mark.usefixtures("rule")
def test_the_messages_of_the_rule_are_billed(tmp_path):
    found = rayfed_lora.run(own_recipe(), str(tmp_path), factory=FakeFactory()).rounds
    # A has 4 + 3 values a rank and B 6 + 4, the head 6; rank 3, six clients, 4 bytes a value.
    assert found["bytes_up"].tolist() == [6 * 4 * (3 * 7 // 2 + 3 * 10 + 6)] * 2
    assert found["bytes_down"].tolist() == [6 * 4 * (3 * 7 + 3 * 10 + 6)] * 2
