"""A frozen base in 16 bits: arithmetic in float32, no saved copies, shared between actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from rayfed_lora.engines.factory import on_device
from rayfed_lora.models import base_models, base_weights
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.precision import shorten
from rayfed_lora.models.quiet import quiet
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.training.weights import built_weights
from rayfed_lora.types import AdapterState, Base, Factors
from tests.unit.test_checkpointing import language, trained
from tests.unit.test_language_models import texts  # noqa: F401 - a fixture

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 1}
KINDS: dict[str, dict[str, Any]] = {"llama": SHAPE, "gpt2": GPT2}
IDS = torch.randint(3, 128, (4, 10), generator=torch.Generator().manual_seed(0))


def net(kind: str) -> Any:
    """Return a model whose weights bfloat16 holds exactly."""
    torch.manual_seed(1)
    found = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    for parameter in found.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return found


def adapted(plain: Any) -> AdaptedModel:
    """Return the model with factors of two clients."""
    model = AdaptedModel(plain, Adapter(target_modules="all-linear", train_head=False))
    draw = np.random.default_rng(2)
    states = [
        AdapterState(
            {
                name: Factors(
                    draw.normal(0, 0.1, (2, layer.in_features)).astype(np.float32),
                    draw.normal(0, 0.1, (layer.out_features, 2)).astype(np.float32),
                    1.0,
                )
                for name, layer in model._layers.items()
            },
            {},
        )
        for _ in range(2)
    ]
    model.load(states, Base(), "adapter")
    model.train(True)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_base_computes_as_the_same_weights_in_float32(kind: str) -> None:
    short = net(kind)
    shorten(short, torch.bfloat16)
    one, other = adapted(short), adapted(net(kind))
    kept = {p.dtype for name, p in one.net.named_parameters() if p.dim() == 2}
    assert kept == {torch.bfloat16}
    found, expected = (model.net(input_ids=IDS, use_cache=False).logits for model in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for logits in (found, expected):
        logits.square().mean().backward()
    for trained_one, trained_other in zip(one.trained, other.trained, strict=True):
        assert trained_one.dtype == torch.float32
        torch.testing.assert_close(trained_one.grad, trained_other.grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        found, expected = (m.net.eval()(input_ids=IDS).logits for m in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_copy_of_a_weight_is_saved_for_the_backward_pass(autocast: bool) -> None:
    short = net("llama")
    shorten(short, torch.bfloat16)
    model = adapted(short)
    own = {p.untyped_storage().data_ptr() for p in model.net.parameters()}
    shapes = {tuple(p.shape) for p in model.net.parameters() if p.dim() == 2}
    copies = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sides = (tuple(tensor.shape), tuple(tensor.t().shape) if tensor.dim() == 2 else ())
        if shapes.intersection(sides) and tensor.untyped_storage().data_ptr() not in own:
            copies.append(tuple(tensor.shape))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.net(input_ids=IDS, use_cache=False).logits.float().square().mean()
    assert copies == []
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trained)


class Largest(TorchDispatchMode):
    """Notes the most bytes of a float32 tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.float32 and not found.is_meta:
            self.bytes = max(self.bytes, found.numel() * 4)
        return found


@pytest.fixture
def source(texts: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A folder with a llama in bfloat16 and a tokenizer of 13 words."""
    config = AutoConfig.for_model("llama", **SHAPE | {"dtype": "bfloat16"})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    with quiet():
        model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def of(source: Path, texts: Path, **overrides: Any) -> Recipe:  # noqa: F811
    recipe = language(texts, "llama", **overrides)
    model = recipe.model.model_copy(update={"source": str(source), "config": {}})
    adapter = recipe.adapter.model_copy(update={"dropout": 0.0, "target_modules": "all-linear"})
    return recipe.model_copy(update={"model": model, "adapter": adapter})


def test_a_short_source_is_read_without_a_float32_copy_and_kept_in_2_1_bytes(
    source: Path,
    texts: Path,  # noqa: F811
) -> None:
    recipe = of(source, texts, model__dtype="bfloat16")
    workload = prepare(recipe)
    config = base_models.restored(workload.config)
    with Largest() as largest:
        built, _ = base_weights.build_kept(recipe.model, config, 0, torch.bfloat16, ())
    # The smallest linear layer, 32 x 64, is not among them.
    assert largest.bytes < 4 * 32 * 64
    arrays = base_weights.arrays_of(built)
    named = dict(built.named_parameters())
    size = sum(arrays[name].nbytes for name in named)
    assert size / sum(p.numel() for p in named.values()) < 2.1
    for array in arrays.values():
        array.flags.writeable = False
    shared = base_weights.assembled(recipe.model, config, arrays)
    assert shared is not None
    for name, parameter in shared.named_parameters():
        assert parameter.data_ptr() == arrays[name].__array_interface__["data"][0]
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=IDS).logits for m in (shared, built))
    assert torch.equal(found, expected)


def test_auto_keeps_the_sources_type_on_a_gpu_and_float32_on_a_cpu(
    source: Path,
    texts: Path,  # noqa: F811
) -> None:
    recipe = of(source, texts)
    workload = prepare(recipe)

    def kept(of_run: Recipe) -> set[np.dtype[Any]]:
        return {array.dtype for array in built_weights(of_run, workload).arrays.values()}

    assert kept(recipe) == kept(on_device(recipe, "cpu")) == {np.dtype(np.float32)}
    assert kept(on_device(recipe, "cuda:0")) == {np.dtype(np.float32), np.dtype(np.uint16)}
    single = recipe.model.model_copy(update={"dtype": "float32"})
    single_recipe = recipe.model_copy(update={"model": single})
    assert kept(on_device(single_recipe, "cuda:0")) == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_clients_train_on_a_short_base_as_on_its_values_in_float32(
    texts: Path,  # noqa: F811
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference keeps each weight rounded to bfloat16, in float32."""
    found, _ = trained(language(texts, kind, model__dtype="bfloat16"), (0, 2))

    def rounded(model: Any, dtype: torch.dtype, dense: Any = ()) -> None:
        shorten(model, dtype, dense)
        for module in model.modules():
            module.__dict__.pop("forward", None)
        model.float()

    monkeypatch.setattr(base_weights, "shorten", rounded)
    expected, _ = trained(language(texts, kind, model__dtype="bfloat16"), (0, 2))
    plain, _ = trained(language(texts, kind), (0, 2))
    assert found.keys() == expected.keys()
    differs = False
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0.0, atol=1e-7)
        differs = differs or not np.allclose(values, plain[name], rtol=0.0, atol=1e-7)
    assert differs


def test_a_full_round_and_a_merge_leave_the_short_weights_as_they_are(texts: Path) -> None:  # noqa: F811
    recipe = language(texts, "llama", model__dtype="bfloat16", adapter__dropout=0.0)
    trainer = LocalTrainer(recipe, prepare(recipe))
    model = trainer._model
    before = {name: p.clone() for name, p in model.resident.source.items()}
    name, layer = next(iter(model._layers.items()))
    update = np.full((layer.out_features, layer.in_features), 1e-4, np.float32)
    tensors = model.initial_tensors("full")
    model.load([AdapterState({}, tensors)], Base(), "full")
    assert {p.dtype for p in model.trained} == {torch.float32}
    model.load([AdapterState({}, {})], Base(0, None, 1, {name: update}), "adapter")
    weight = model.net.get_parameter(f"{name}.weight")
    # Rounded to bfloat16 the update would be lost.
    torch.testing.assert_close(
        weight.float(), before[f"{name}.weight"].float() + 1e-4, rtol=0.0, atol=1e-9
    )
    model.load([AdapterState({}, {})], Base(), "adapter")
    for each, values in before.items():
        assert torch.equal(model.net.get_parameter(each), values)
