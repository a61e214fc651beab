"""Adapters of many architectures compute the same logits in plain peft and transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from rayfed_lora.models import base_models, base_weights
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.export import write_adapter
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.shapes import image_shape, model_shape
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import AdapterState, Base, Factors, ModelShape
from tests.architectures import TABLE
from tests.fakes import make_recipe

pytestmark = [
    # PEFT asks transformers 5 for a property that it is about to rename, and says what it does.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    # torch, of code inside transformers.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LONGEST, CLASSES = 9, 3
PEFT = {
    "text-classification": peft.AutoPeftModelForSequenceClassification,
    "causal-lm": peft.AutoPeftModelForCausalLM,
    "image-classification": peft.AutoPeftModel,
}
ALL = [(task, name) for task, table in TABLE.items() for name in table]
# Two of each task for the slower ways to load.
SOME = [(task, name) for task, table in TABLE.items() for name in [*table][1:12:6]]
# All, of which two in three are left to `make e2e`.
ORDINARY = [
    pytest.param(task, name, id=f"{task}-{name}", marks=[pytest.mark.e2e] * (i % 3 > 0))
    for i, (task, name) in enumerate(ALL)
]


def recipe_of(task: str, name: str) -> Recipe:
    config = {"architecture": name, **TABLE[task][name]}
    config.pop("image_size", None)
    model = {"task": task, "source": "config", "config": config}
    return make_recipe(
        **{f"model__{key}": value for key, value in model.items()},
        adapter__target_modules="all-linear",
        data__max_length=LONGEST,
    )


def inputs_of(task: str, config: Any) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    if task == "image-classification":
        pixels = rng.normal(size=(3, *image_shape(config))).astype(np.float32)
        return {"pixel_values": torch.from_numpy(pixels)}
    ids = torch.from_numpy(rng.integers(5, 40, (3, LONGEST)))
    ids[:, -1] = 2  # BART's kind classifies the end token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def trained_state(shape: ModelShape, net: nn.Module) -> AdapterState:
    """Return random factors of ranks 1, 2, 3, 1, ... and a random head."""
    rng = np.random.default_rng(1)

    def normal(*sizes: int) -> Any:
        return rng.normal(0.0, 0.3, sizes).astype(np.float32)

    ranks = {n: min(1 + i % 3, s.max_rank) for i, (n, s) in enumerate(shape.modules.items())}
    factors = {
        name: Factors(normal(ranks[name], s.d_in), normal(s.d_out, ranks[name]), 1.7)
        for name, s in shape.modules.items()
    }
    return AdapterState(factors, {n: normal(*net.get_parameter(n).shape) for n in shape.head})


def exported(task: str, name: str, folder: Path) -> tuple[Recipe, Any]:
    """Write a base and an adapter; return the recipe and a function that gives our own logits."""
    recipe = recipe_of(task, name)
    facts = {} if task == "causal-lm" else {"num_labels": CLASSES}
    # Not every configuration has one of its own; a run takes it from the data.
    facts |= {k: v for k, v in TABLE[task][name].items() if k == "image_size"}
    config = base_models.configuration(recipe.model, facts)
    net = base_weights.build(recipe.model, config, seed=0)
    torch.manual_seed(0)
    for key, buffer in net.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_()
    shape = model_shape(base_models.skeleton(recipe.model, config), recipe)
    state, inputs = trained_state(shape, net), inputs_of(task, config)
    obstacle, modules = shape.obstacle, list(shape.modules)
    model = AdaptedModel(copy.deepcopy(net), recipe.adapter, "cpu", obstacle, modules)
    model.load([state], Base(), "adapter")
    model.train(False)
    with torch.no_grad():
        expected, plain = model.net(**inputs).logits, net.eval()(**inputs).logits
    assert (expected - plain).abs().max() > 1e-3
    with quiet():
        net.save_pretrained(folder / "base")
    write_adapter(folder / "adapter", state, net, recipe, str(folder / "base"))
    return recipe, (inputs, expected)


def assert_equal_logits(load: Callable[[], Any], logits: Any) -> None:
    inputs, expected = logits
    with quiet(), torch.no_grad():
        found = load().eval()(**inputs).logits
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(("task", "name"), ORDINARY)
def test_peft_finds_the_base_and_computes_the_same(
    task: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, logits = exported(task, name, Path())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = str(tmp_path / "adapter")
    assert_equal_logits(lambda: PEFT[task].from_pretrained(folder), logits)


def other_ways(task: str, name: str, folder: Path) -> None:
    recipe, logits = exported(task, name, folder)
    auto, adapter = base_models.auto_class(recipe.model), str(folder / "adapter")

    def merged() -> Any:
        base = auto.from_pretrained(str(folder / "base"))
        return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()

    assert_equal_logits(merged, logits)
    # transformers finds the base, too, and puts the layers in by itself.
    assert_equal_logits(lambda: auto.from_pretrained(adapter), logits)


@pytest.mark.parametrize(("task", "name"), SOME)
def test_merging_and_transformers_compute_the_same(task: str, name: str, tmp_path: Path) -> None:
    other_ways(task, name, tmp_path)


@pytest.mark.e2e
@pytest.mark.parametrize(("task", "name"), [each for each in ALL if each not in SOME])
def test_merging_and_transformers_compute_the_same_in_all_others(
    task: str, name: str, tmp_path: Path
) -> None:
    other_ways(task, name, tmp_path)
