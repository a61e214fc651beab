"""Own nn.Modules: built from options, the same in all processes, exported."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pandas as pd
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


def test_its_files_load_by_peft_and_torch_alone_into_the_module_itself(tmp_path):
    chosen = decorated()(hidden=5, norm=True)
    run = rayfed_lora.run(load_recipe(VALUES | {"name": "own"}, plugins=[chosen]), str(tmp_path))
    # The names in the files begin with `net.`.
    module = _plain_module(load_file(str(tmp_path / "base" / "model.safetensors")))
    loaded = peft.PeftModel.from_pretrained(module, str(tmp_path / "adapter")).eval()
    module = _plain_module(load_file(str(tmp_path / "base" / "model.safetensors")))
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    config.base_model_name_or_path = None  # the module has no name
    made = peft.get_peft_model(module, config)
    tensors = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    found = peft.set_peft_model_state_dict(made, tensors)
    assert not found.unexpected_keys
    pixels = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = run.model().eval()(pixel_values=pixels).logits
        plain = _plain_module(load_file(str(tmp_path / "base" / "model.safetensors"))).eval()
        assert (plain(pixels) - expected).abs().max() > 1e-3
        torch.testing.assert_close(loaded(pixels), expected)
        torch.testing.assert_close(made.eval()(pixels), expected)


def _plain_module(weights):
    """Return the module of `decorated()(hidden=5, norm=True)`, written by torch alone."""
    first = nn.Linear(64, 5)
    inside = nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(5), nn.Linear(5, 10))
    module = nn.Sequential(OrderedDict(net=inside))
    module.load_state_dict(weights)
    return module


def test_rows_of_numbers_are_images_of_one_line(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 6)).astype(np.float32)
    labels = (features[:, 2] > 0).astype(np.int64)
    frame = pd.DataFrame({"image": [row[None] for row in features], "label": labels})
    seen = []

    @model("perceptron-of-a-test")
    def perceptron(channels, height, width, classes, *, hidden: int = 8):
        seen.append((channels, height, width, classes))
        first = nn.Linear(width, hidden)
        return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(hidden, classes))

    recipe = load_recipe(VALUES | {"name": "own"}, plugins=[perceptron()]).with_(
        {"clients.local_steps": 20}
    )
    run = rayfed_lora.run(recipe, str(tmp_path / "run"), data=frame)
    assert set(seen) == {(1, 1, 6, 2)}
    assert run.rounds["eval_loss"].iloc[-1] < run.rounds["eval_loss"].iloc[0]
    rows = torch.from_numpy(features[:, None, None])
    assert run.model()(pixel_values=rows).logits.shape == (80, 2)


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
