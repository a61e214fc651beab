"""The memory of an actor that `plan` foretells, by hand."""

from __future__ import annotations

from typing import Any

import pytest

import rayfed_lora
from rayfed_lora.launching.memory_plan import ActorMemory, actor_memory
from rayfed_lora.types import ModelShape, ModuleShape
from tests.fakes import make_recipe

# Two matrices of 100 x 50 and a head of 10 x 50, a vector of 50; 40,000 bytes of activations.
SHAPE = ModelShape(
    {"q": ModuleShape(50, 100), "v": ModuleShape(50, 100)},
    head_params=500,
    total_params=10_550,
    head=("head.weight",),
    activation_bytes=40_000,
    tensors={
        "q.weight": (100, 50),
        "v.weight": (100, 50),
        "norm.weight": (50,),
        "head.weight": (10, 50),
    },
)


def planned(device: Any = "cpu", *, short: bool = False, **settings: Any) -> ActorMemory:
    recipe = make_recipe(clients__batch_size=8, **settings)
    return actor_memory(recipe, SHAPE, 1000, 3, device, short=short)


@pytest.mark.parametrize(
    ("device", "short", "dtype", "base"),
    [
        ("cpu", False, "auto", 42_200),
        # auto: as in the source on a GPU alone.
        ("cpu", True, "auto", 42_200),
        ("cuda", True, "auto", 42_200 - 20_000),
        ("cuda", True, "float32", 42_200),
        ("cuda", False, "auto", 42_200),
        # The head is trained, and stays in four bytes.
        ("cpu", False, "bfloat16", 42_200 - 20_000),
    ],
)
def test_the_base_is_counted_as_it_is_kept(device: Any, short: bool, dtype: str, base: int) -> None:
    assert planned(device, short=short, model__dtype=dtype).base == base


@pytest.mark.parametrize(
    ("settings", "values"),
    # Weights and gradients, and what the optimiser keeps for each.
    [({}, 2), ({"momentum": 0.9}, 3), ({"name": "adamw"}, 4), ({"name": "adagrad"}, 3)],
)
def test_a_client_has_its_factors_gradients_and_optimiser(
    settings: dict[str, Any], values: int
) -> None:
    own = {f"clients__optimizer__{key}": value for key, value in settings.items()}
    assert planned(**own).trained == 1000 * 4 * values


def test_the_sum_and_how_many_fit() -> None:
    """Three times the outputs of linear layers of 8 examples are 960,000 bytes."""
    found = planned()
    assert found.activations == 3 * 40_000 * 8
    assert found.total == 42_200 + 3 * (8_000 + 960_000)
    # A tenth stays free: 1,800,000 - 42,200 are 1.8 clients, 9,000,000 - 42,200 are 9.2.
    assert (found.fitting(2_000_000), found.fitting(10_000_000), found.fitting(1)) == (1, 9, 0)


def test_a_plan_has_it_and_full_model_rounds_have_none() -> None:
    plan = rayfed_lora.plan("digits-vit")
    assert [each.device for each in plan.memory] == ["cpu", "cuda"]
    assert plan.memory[0].base == plan.outline.shape.total_params * 4
    assert plan.memory[0].clients == 3
    only = rayfed_lora.Recipe.load("digits-vit").with_({"method": "fedavg"})
    assert rayfed_lora.plan(only).memory == ()
