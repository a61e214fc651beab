"""A base that actors share: built around arrays that nobody may write to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rayfed_lora.models import base_models, base_weights
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.shapes import adapted_modules
from rayfed_lora.recipe.model import Adapter, Model
from rayfed_lora.types import AdapterState, Base, Factors

VIT = Model.model_validate(
    {
        "task": "image-classification",
        "source": "config",
        "config": {
            "architecture": "vit",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "num_labels": 3,
        },
    }
)
# Its output embedding and its word embedding are one tensor.
TIED = Model.model_validate(
    {
        "task": "text-classification",
        "source": "config",
        "config": {
            "architecture": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "vocab_size": 20,
            "num_labels": 3,
        },
    }
)
IMAGES = torch.from_numpy(np.random.default_rng(7).normal(size=(5, 1, 8, 8)).astype(np.float32))


def built(model: Model) -> tuple[nn.Module, Any]:
    config = base_models.configuration(model, {})
    return base_weights.build(model, config, seed=4), config


def shared(net: nn.Module) -> dict[str, np.ndarray]:
    """Return a model's weights as they come out of the object store: read-only copies."""
    arrays = {name: array.copy() for name, array in base_weights.arrays_of(net).items()}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def assembled(model: Model, arrays: dict[str, np.ndarray]) -> nn.Module:
    net = base_weights.assembled(model, base_models.configuration(model, {}), arrays)
    assert net is not None
    return net


def test_a_model_around_shared_arrays_computes_as_the_built_one():
    net, _ = built(VIT)
    other = assembled(VIT, shared(net))
    with torch.no_grad():
        expected, got = (m.eval()(pixel_values=IMAGES).logits for m in (net, other))
    assert torch.equal(got, expected)


def test_a_text_model_gets_its_buffers_too():
    net, _ = built(TIED)
    other = assembled(TIED, shared(net))
    ids = torch.tensor([[1, 5, 7, 2]])
    with torch.no_grad():
        expected, got = (m.eval()(input_ids=ids).logits for m in (net, other))
    assert torch.equal(got, expected)


def test_no_weight_is_copied():
    net, _ = built(VIT)
    arrays = shared(net)
    for name, parameter in assembled(VIT, arrays).named_parameters():
        assert np.shares_memory(parameter.detach().numpy(), arrays[name])


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.other.weight = self.one.weight

    arrays = base_weights.arrays_of(Tied())
    assert np.shares_memory(arrays["one.weight"], arrays["other.weight"])


@pytest.mark.parametrize("trainable", ["adapter", "full"])
def test_training_folding_and_replacing_leave_the_shared_arrays_as_they_are(trainable):
    net, _ = built(VIT)
    arrays = shared(net)
    before = {name: array.copy() for name, array in arrays.items()}
    adapter = Adapter.model_validate({})
    model = AdaptedModel(assembled(VIT, arrays), adapter)
    names = adapted_modules(net, adapter)
    one = {
        n: Factors(np.ones((1, 16), np.float32), np.ones((16, 1), np.float32), 1.0) for n in names
    }
    state = AdapterState(one if trainable == "adapter" else {}, model.initial_tensors(trainable))
    merged = {name: f.scale * f.b @ f.a for name, f in one.items()}
    for base in (Base(), Base(0, None, 1, merged), Base(1, before), Base()):
        model.load([state], base, trainable)
        parameters = list(model.parameters(state).values())
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        model.net(pixel_values=IMAGES).logits.square().sum().backward()
        optimizer.step()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])
    # And after all that the source's own weights are back.
    model.load([AdapterState({}, model.initial_tensors("adapter"))], Base(), "adapter")
    with torch.no_grad():
        expected = net.eval()(pixel_values=IMAGES).logits
        got = model.net.eval()(pixel_values=IMAGES).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
