"""GPT-2's layers, whose weight is (d_in, d_out), compute and are merged as in plain PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import GPT2Config, GPT2ForSequenceClassification

from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.export import write_adapter
from rayfed_lora.models.linear import sides
from rayfed_lora.models.shapes import adapted_modules
from rayfed_lora.types import AdapterState, Base, Factors
from tests.fakes import make_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# c_attn is 48 x 16, c_proj of the attention square, c_fc 24 x 16, c_proj behind it 16 x 24.
CONFIG = GPT2Config(
    vocab_size=20,
    n_positions=12,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_inner=24,
    num_labels=3,
    initializer_range=0.2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
RECIPE = make_recipe(
    model__task="text-classification", adapter__target_modules="all-linear", adapter__alpha=6.0
)
ADAPTER = RECIPE.adapter
RANK, SCALE = 3, 2.0


def plain() -> Any:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(CONFIG)


def texts() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(1, 20, (4, 8)), "attention_mask": torch.ones(4, 8).long()}


def state(seed: int = 0) -> AdapterState:
    net, rng = plain(), np.random.default_rng(seed)
    factors = {}
    for name in adapted_modules(net, ADAPTER):
        shape = sides(net.get_submodule(name))
        a, b = rng.normal(0, 0.3, (RANK, shape.d_in)), rng.normal(0, 0.3, (shape.d_out, RANK))
        factors[name] = Factors(a.astype(np.float32), b.astype(np.float32), SCALE)
    return AdapterState(factors, {"score.weight": rng.normal(size=(3, 16)).astype(np.float32)})


def peft_of(given: AdapterState) -> Any:
    """Return a plain PEFT model with the factors and the head of a state."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,
        target_modules=sorted(given.factors),
        modules_to_save=["score"],
        fan_in_fan_out=True,
    )
    model = get_peft_model(plain(), config)
    layers = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for name, f in given.factors.items():
            layers[name].lora_A.default.weight.copy_(torch.tensor(f.a))
            layers[name].lora_B.default.weight.copy_(torch.tensor(f.b))
        head = layers["score"].modules_to_save.default
        head.weight.copy_(torch.tensor(given.dense["score.weight"]))
    return model


def trained(model: Any, names: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    layers = dict(model.base_model.model.named_modules())
    found = {f"{n}.lora_A": layers[n].lora_A.default.weight for n in names}
    found |= {f"{n}.lora_B": layers[n].lora_B.default.weight for n in names}
    return {**found, "score.weight": layers["score"].modules_to_save.default.weight}


def test_all_linear_finds_what_peft_finds() -> None:
    config = LoraConfig(r=1, target_modules="all-linear", fan_in_fan_out=True, task_type="SEQ_CLS")
    found = get_peft_model(plain(), config).base_model.targeted_module_names
    assert sorted(adapted_modules(plain(), ADAPTER)) == sorted(found)
    assert len(found) == 8


@pytest.mark.parametrize("clients", [1, 3])
def test_logits_and_a_step_of_training_are_plain_pefts(clients: int) -> None:
    given = [state(seed) for seed in range(clients)]
    model = AdaptedModel(plain(), ADAPTER)
    model.load(given, Base(), "adapter")
    model.train(True)
    inputs, labels = texts(), torch.tensor([0, 1, 2, 1])
    together = {name: tensor.repeat(clients, 1) for name, tensor in inputs.items()}
    logits = model.net(**together).logits
    losses = functional.cross_entropy(logits, labels.repeat(clients), reduction="none")
    losses.view(clients, -1).mean(dim=1).sum().backward()
    optimizer = torch.optim.SGD(model.trained, lr=0.1)
    optimizer.step()
    for i, each in enumerate(given):
        reference = peft_of(each)
        expected = reference(**inputs).logits
        torch.testing.assert_close(logits[4 * i : 4 * i + 4], expected, rtol=1e-4, atol=1e-5)
        functional.cross_entropy(expected, labels).backward()
        weights = trained(reference, each.factors)
        torch.optim.SGD(list(weights.values()), lr=0.1).step()
        (read,) = model.read_from([each], i)
        for name, f in read.factors.items():
            for part, found in (("A", f.a), ("B", f.b)):
                wanted = weights[f"{name}.lora_{part}"].detach().numpy()
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
            assert np.abs(f.b - each.factors[name].b).max() > 1e-4
        wanted = weights["score.weight"].detach().numpy()
        np.testing.assert_allclose(read.dense["score.weight"], wanted, rtol=1e-4, atol=1e-5)


def test_updates_that_are_folded_into_the_base_are_pefts_merged_weights() -> None:
    given = state()
    merged = {name: f.scale * f.b @ f.a for name, f in given.factors.items()}
    model = AdaptedModel(plain(), ADAPTER)
    base = Base(merges=1, merged=merged)
    model.load([AdapterState({}, given.dense)], base, "adapter")
    found = model.tensors("full")
    reference = peft_of(given).merge_and_unload()
    for name, parameter in reference.named_parameters():
        wanted = parameter.detach().numpy()
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_full_round_keeps_the_shapes_of_the_plain_model() -> None:
    net = plain()
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    model = AdaptedModel(net, ADAPTER)
    assert {n: t.shape for n, t in model.initial_tensors("full").items()} == shapes
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (16, 48)


def test_an_exported_adapter_is_one_that_plain_peft_loads(tmp_path: Path) -> None:
    given = state()
    write_adapter(tmp_path, given, plain(), RECIPE, "nowhere")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    loaded, model = (
        PeftModel.from_pretrained(plain(), str(tmp_path)),
        AdaptedModel(plain(), ADAPTER),
    )
    model.load([given], Base(), "adapter")
    model.train(False)
    with torch.no_grad():
        expected, found = loaded.eval()(**texts()).logits, model.net(**texts()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
