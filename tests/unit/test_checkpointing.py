"""Activation checkpointing: the same bits for less memory, dropout and fused clients included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.checkpointing import Checkpointing
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.memory import checkpoints, room_bytes, step_bytes
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Factors, LocalPlan, ModelShape
from tests.fakes import SHAPE, make_recipe
from tests.tasks import train
from tests.unit.test_language_models import RECIPE as LANGUAGE
from tests.unit.test_language_models import texts  # noqa: F401 - a fixture

# 2 layers; in training the linear layers of each are called twice where they are computed again.
LAYERS = 2
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model.config.attention_dropout": 0.2, "adapter.dropout": 0.3},
    "gpt2": {
        "model.config": {
            "architecture": "gpt2",
            "n_embd": 16,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_positions": 32,
        }
    },
    "bert": {
        "model.task": "text-classification",
        "model.config": {"architecture": "bert", "num_attention_heads": 2, **SMALL},
        "adapter.train_head": True,
    },
}


def language(folder: Path, kind: str, **overrides: Any) -> Recipe:
    source = folder / "texts.jsonl"
    if kind == "bert":
        source = folder / "labelled.jsonl"
        rows = [{"text": "who is the dog " * (i % 4 + 1), "label": i % 2} for i in range(60)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"data.source": str(source), "model.tokenizer": str(folder / "tokenizer")}
    chosen = dict(KINDS[kind])
    config = chosen.pop("model.config", LANGUAGE["model"]["config"])
    start = LANGUAGE | {"model": LANGUAGE["model"] | {"config": config}}
    values = own | chosen | {k.replace("__", "."): v for k, v in overrides.items()}
    return load_recipe(start, values)


def trained(recipe: Recipe, clients: tuple[int, ...]) -> tuple[dict[str, np.ndarray], int]:
    """Return what clients of one block send back, and calls of one linear layer of the model."""
    trainer = LocalTrainer(recipe, prepare(recipe))
    draw = np.random.default_rng(1)
    factors = {
        name: Factors(
            draw.normal(0, 0.2, (2, m.d_in)).astype(np.float32),
            draw.normal(0, 0.2, (m.d_out, 2)).astype(np.float32),
            4.0,
        )
        for name, m in trainer.shape().modules.items()
    }
    state = AdapterState(factors, trainer._model.initial_tensors("adapter"))
    calls = []
    # Attention over keys and values from a cache has other last bits; checkpointing goes without.
    trainer._model.net.config.use_cache = False
    trainer._model.net.get_submodule(next(iter(factors))).register_forward_hook(
        lambda *_: calls.append(1)
    )
    found = {}
    for update in train(trainer, clients, state, LocalPlan(1, "adapter", 0.5, 0.0)):
        assert update.state is not None
        for name, f in update.state.factors.items():
            found |= {f"{update.client}.{name}.a": f.a, f"{update.client}.{name}.b": f.b}
    return found, len(calls)


@pytest.mark.parametrize("clients", [(2,), (0, 2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_again_has_the_same_bits_with_dropout_too(
    texts: Path,  # noqa: F811
    kind: str,
    clients: tuple[int, ...],
) -> None:
    kept, once = trained(language(texts, kind), clients)
    recipe = language(texts, kind, runtime__checkpoint_activations=True)
    found, twice = trained(recipe, clients)
    # Three steps, each computed twice.
    assert (once, twice) == (3, 6)
    assert found.keys() == kept.keys()
    for name, values in kept.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_an_image_model_has_the_same_bits() -> None:
    """Its last layer is computed for its first token only, and is not computed again."""
    values = {
        "data__source": "digits",
        "model__config": {"architecture": "vit", "num_attention_heads": 2, **SMALL},
        "annealing__initiating__rounds": 0,
    }
    values["model__config"] |= {"image_size": 8, "patch_size": 4, "num_channels": 1}
    values["model__config"] |= {"hidden_dropout_prob": 0.2}
    kept, once = trained(make_recipe(**values), (0, 1))
    recipe = make_recipe(**values, runtime__checkpoint_activations=True)
    found, twice = trained(recipe, (0, 1))
    assert twice == 2 * once
    for name, expected in kept.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_it_can_be_switched_off_again() -> None:
    net = base_models.auto_class(
        make_recipe(model__task="causal-lm", adapter__train_head=False).model
    )
    config = base_models.AutoConfig.for_model(
        "llama", vocab_size=20, num_attention_heads=2, num_key_value_heads=2, **SMALL
    )
    model = net.from_config(config).train()
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    switch = Checkpointing(model)
    for on, expected in ((True, 2), (False, 1), (True, 2)):
        switch.switch(on=on)
        calls.clear()
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum().backward()
        assert len(calls) == expected


def sized(**values: Any) -> ModelShape:
    return replace(SHAPE, linear_flops=1e6, **values)


def test_auto_begins_where_a_block_of_a_language_model_would_take_over_a_gigabyte() -> None:
    recipe = make_recipe(clients__batch_size=4)
    # 3 * (60 - 20) MB of an example, 4 examples: 480 MB of one client.
    shape = sized(activation_bytes=60_000_000, logit_bytes=20_000_000, checkpointed_bytes=2_000_000)
    assert [checkpoints(recipe, shape, n, "cpu") for n in (1, 2, 3)] == [False, False, True]
    assert [checkpoints(recipe, shape, n, "cuda") for n in (16, 17)] == [False, True]
    assert step_bytes(recipe, shape, "cpu") == 480e6
    # Four copies of 16 MiB of logits.
    assert room_bytes(shape, "cpu") == 1e9 - 4 * 2**24
    # Longer texts: 1.92 GB of one client alone, 4 * 2 MB where it is computed again.
    longer = replace(shape, activation_bytes=180_000_000)
    assert step_bytes(recipe, longer, "cpu") == 8e6
    assert (
        step_bytes(
            make_recipe(clients__batch_size=4, runtime__checkpoint_activations=False), longer, "cpu"
        )
        == 1.92e9
    )
    # A classifier stays as it was, whatever it takes.
    images = sized(activation_bytes=600_000_000, checkpointed_bytes=2_000_000)
    assert not checkpoints(recipe, images, 32, "cpu")
    assert step_bytes(recipe, images, "cpu") == 3 * 600e6 * 4
    assert room_bytes(images, "cpu") == 1e9


def test_the_sizes_of_a_language_model_are_those_of_its_layers(texts: Path) -> None:  # noqa: F811
    recipe = language(texts, "llama")
    with torch.device("meta"):
        config = base_models.AutoConfig.for_model(
            "llama", vocab_size=20, num_attention_heads=2, num_key_value_heads=1, **SMALL
        )
        net = base_models.auto_class(recipe.model).from_config(config)
    found = model_shape(net, recipe)
    length = 8
    # Of a token: q 16, k and v 8 each, o 16, gate and up 24 each, down 16.
    layer = 16 + 8 + 8 + 16 + 24 + 24 + 16
    assert found.logit_bytes == 4 * length * 20
    assert found.activation_bytes == 4 * length * (LAYERS * layer + 20)
    assert found.checkpointed_bytes == 4 * length * (LAYERS * 16 + 3 * layer)


def test_a_model_that_cannot_be_computed_again_is_rejected() -> None:
    values = {
        "data__source": "digits",
        "model__config": {
            "architecture": "resnet",
            "num_channels": 1,
            "hidden_sizes": [8],
            "depths": [1],
        },
        "annealing__mode": "full",
    }
    prepare(make_recipe(**values))
    recipe = make_recipe(**values, runtime__checkpoint_activations=True)
    net = base_models.skeleton(recipe.model, base_models.configuration(recipe.model, {}))
    with pytest.raises(
        ModelError, match=r"checkpoint_activations: expected auto or false with Res"
    ):
        model_shape(net, recipe)
