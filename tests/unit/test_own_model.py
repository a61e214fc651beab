"""Own nn.Modules: built from options, the same in all processes, exported."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

import rayfed_lora
from rayfed_lora.errors import PluginError, RecipeError
from rayfed_lora.plugins import model
from rayfed_lora.recipe.loading import load_recipe

pytestmark = [
    pytest.mark.usefixtures("forgotten_methods"),
    # PEFT asks transformers 5 for a property that it is about to rename.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]
VALUES = {
    "data": {"source": "digits", "max_examples": 80, "partition": {"clients": 4}},
    "annealing": {
        "initiating": {"rounds": 1},
        "heating": {"rounds": 1, "rank": 4},
        "cooling": {"rounds": 1, "rank": 2},
        "holding": {"rounds": 0},
    },
    "adapter": {"target_modules": ["net.1"]},
    "clients": {"per_round": 3, "local_steps": 2, "batch_size": 8, "optimizer": {"lr": 0.1}},
    "runtime": {"executor": "local"},
}


def decorated():
    @model("mlp-of-a-test")
    def mlp(channels, height, width, classes, *, hidden: int = 6, norm: bool = False):
        inside = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        first = nn.Linear(channels * height * width, hidden)
        return nn.Sequential(nn.Flatten(), first, inside, nn.Linear(hidden, classes))

    return mlp


@pytest.mark.parametrize("norm", [False, True])
def test_a_run_is_the_same_in_threads_and_its_adapter_loads_in_plain_peft(norm, tmp_path):
    chosen = decorated()(hidden=5, norm=norm)
    runs = {}
    for threads in (1, 2):
        recipe = load_recipe(VALUES | {"name": "own"}, plugins=[chosen]).with_(
            {"runtime.client_actors": threads}
        )
        runs[threads] = rayfed_lora.run(recipe, str(tmp_path / str(threads)))
    one, two = runs.values()
    assert one.summary["adapter_sha256"] == two.summary["adapter_sha256"]
    assert one.rounds["eval_loss"].iloc[-1] < one.rounds["eval_loss"].iloc[0]
    stored = load_recipe(str(tmp_path / "1" / "recipe.yaml"))
    assert stored.model.config == {"architecture": "mlp-of-a-test", "hidden": 5, "norm": norm}
    # The head is the last layer with an output for each of the ten classes.
    written = load_file(str(tmp_path / "1" / "adapter" / "adapter_model.safetensors"))
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    assert shapes["base_model.model.net.1.lora_A.weight"] == (2, 64)
    assert shapes["base_model.model.net.3.weight"] == (10, 5)
    base = AutoModelForImageClassification.from_pretrained(str(tmp_path / "1" / "base"))
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "1" / "adapter")).eval()
    pixels = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = one.model().eval()(pixel_values=pixels).logits
        torch.testing.assert_close(adapted(pixel_values=pixels).logits, expected)


def test_a_recipe_names_it_with_its_options_which_are_typed():
    decorated()
    named = {**VALUES, "model": {"source": "mlp-of-a-test", "hidden": 7}}
    recipe = load_recipe(named)
    assert recipe.model.source == "config"
    assert recipe.model.config == {"architecture": "mlp-of-a-test", "hidden": 7}
    # In place of another model, whose values go with it.
    shipped = rayfed_lora.Recipe.load("digits-vit").with_({"model": {"source": "mlp-of-a-test"}})
    assert shipped.model.config == {"architecture": "mlp-of-a-test"}
    for config, said in (
        ({"hidden": "many"}, "option hidden of own model 'mlp-of-a-test'"),
        ({"depth": 2}, "option depth of own model"),
    ):
        with pytest.raises(RecipeError, match=said):
            recipe.with_({f"model.config.{key}": value for key, value in config.items()})
    with pytest.raises(RecipeError, match="expected task image-classification with own model"):
        recipe.with_({"model.task": "text-classification"})


def test_what_builds_no_module_is_named():
    @model()
    def not_a_module(channels, height, width, classes):
        return None

    recipe = load_recipe({**VALUES, "model": {"source": "not-a-module"}})
    with pytest.raises(rayfed_lora.errors.ModelError, match=r"expected a torch.nn.Module, got"):
        rayfed_lora.plan(recipe)


def test_options_need_types():
    with pytest.raises(PluginError, match="each option needs a type"):

        @model()
        def untyped(channels, height, width, classes, *, hidden=3):
            return nn.Flatten()
