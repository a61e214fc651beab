"""Which modules are adapted, what the head is, and how large all of it is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
)

from rayfed_lora.errors import ModelError
from rayfed_lora.models.base_models import skeleton
from rayfed_lora.models.heads import head_modules, head_parameters
from rayfed_lora.models.shapes import adapted_modules, model_shape
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.types import ModuleShape
from tests.fakes import make_recipe

CLASSES = 3


def vit() -> nn.Module:
    """Two layers of width 16 on 1 x 8 x 8 images in four patches."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def bert() -> nn.Module:
    """Two layers of width 16, 30 tokens."""
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=30,
        max_position_embeddings=8,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


def adapter(**values: Any) -> Adapter:
    return Adapter.model_validate(values)


class Headless(nn.Module):
    """A model that is its encoder and nothing else."""

    base_model_prefix = "encoder"

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 2)


def test_auto_finds_the_query_and_value_projections_of_a_vit_in_model_order() -> None:
    assert adapted_modules(vit(), adapter()) == [
        f"vit.layers.{layer}.attention.{part}"
        for layer in range(2)
        for part in ("q_proj", "v_proj")
    ]


def test_auto_finds_query_and_value_of_a_bert_in_model_order() -> None:
    assert adapted_modules(bert(), adapter()) == [
        f"bert.encoder.layer.{layer}.attention.self.{part}"
        for layer in range(2)
        for part in ("query", "value")
    ]


def test_auto_on_a_model_without_attention_lists_the_linear_modules_there_are() -> None:
    net = nn.Sequential()
    net.add_module("inner", nn.Linear(2, 2))
    net.add_module("head", nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"auto finds no query and value.* end in inner"):
        adapted_modules(net, adapter(head_modules=["head"]))


def test_all_linear_takes_every_linear_layer_but_the_head() -> None:
    # A layer has q, k, v, o, fc1 and fc2; the classifier is the head.
    parts = (
        *(f"attention.{p}_proj" for p in "qkvo"),
        "mlp.fc1",
        "mlp.fc2",
    )
    expected = [f"vit.layers.{layer}.{part}" for layer in range(2) for part in parts]
    assert adapted_modules(vit(), adapter(target_modules="all-linear")) == expected


def test_all_linear_leaves_the_head_out_also_where_the_head_is_not_trained() -> None:
    found = adapted_modules(vit(), adapter(target_modules="all-linear", train_head=False))
    assert "classifier" not in found


@pytest.mark.parametrize(
    "targets",
    [["k_proj", "fc2"], ["1.mlp.fc1"], r".*\.0\..*(q_proj|fc1)", r"vit\.layers\.1\.mlp\.fc\d"],
)
def test_name_endings_and_regexes_match_the_modules_that_peft_matches(
    targets: str | list[str],
) -> None:
    reference = vit()
    inject_adapter_in_model(LoraConfig(r=1, target_modules=targets), reference)
    expected = [n for n, m in reference.named_modules() if isinstance(m, LoraLayer)]
    assert expected
    assert adapted_modules(vit(), adapter(target_modules=targets)) == expected


def test_a_name_ending_matches_only_after_a_dot() -> None:
    # `fc1` ends in `c1`, but no module is called c1.
    with pytest.raises(ModelError, match="matches nothing"):
        adapted_modules(vit(), adapter(target_modules=["c1"]))


def test_a_bad_regex_is_refused_with_its_text_and_the_reason() -> None:
    with pytest.raises(ModelError, match=re.escape("'q_proj(' is no regex")):
        adapted_modules(vit(), adapter(target_modules="q_proj("))


@pytest.mark.parametrize("targets", ["qproj", ["qproj"]])
def test_targets_that_match_nothing_list_the_endings_there_are(targets: str | list[str]) -> None:
    with pytest.raises(ModelError, match="matches nothing") as refused:
        adapted_modules(vit(), adapter(target_modules=targets))
    for ending in ("attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"):
        assert ending in str(refused.value)


@pytest.mark.parametrize("targets", ["auto", "all-linear", ["classifier"]])
def test_a_model_without_linear_layers_outside_its_head_is_refused(
    targets: str | list[str],
) -> None:
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1])
    net = ResNetForImageClassification(config)
    with pytest.raises(ModelError, match=r"nn\.Linear modules, and the model has none outside"):
        adapted_modules(net, adapter(target_modules=targets))


def test_a_target_that_is_not_linear_is_refused_by_name_and_kind() -> None:
    with pytest.raises(ModelError, match=r"'vit.layers.0.layernorm_before' is LayerNorm"):
        adapted_modules(vit(), adapter(target_modules=["layernorm_before"]))


def test_a_trained_head_cannot_be_adapted_too() -> None:
    with pytest.raises(ModelError, match="matches nothing"):
        adapted_modules(vit(), adapter(target_modules=["classifier"]))


def test_a_named_head_takes_its_modules_out_of_the_adapted_ones() -> None:
    chosen = adapter(head_modules=["vit.layers.1", "classifier"])
    assert adapted_modules(vit(), chosen) == [
        "vit.layers.0.attention.q_proj",
        "vit.layers.0.attention.v_proj",
    ]


@pytest.mark.parametrize("net", [vit(), bert()], ids=["vit", "bert"])
def test_the_head_found_by_itself_is_the_classifier(net: nn.Module) -> None:
    assert head_modules(net, adapter()) == ["classifier"]
    assert head_parameters(net, adapter()) == ["classifier.weight", "classifier.bias"]


def test_a_head_can_be_named_inside_the_encoder() -> None:
    chosen = adapter(head_modules=["vit.layernorm", "classifier"])
    assert head_parameters(vit(), chosen) == [
        "vit.layernorm.weight",
        "vit.layernorm.bias",
        "classifier.weight",
        "classifier.bias",
    ]


def test_a_head_module_that_is_not_there_is_refused_and_the_others_are_listed() -> None:
    with pytest.raises(ModelError, match=r"no module 'classifer'; there are .*classifier"):
        head_modules(vit(), adapter(head_modules=["classifer"]))


def test_a_model_with_only_an_encoder_has_no_head_to_find() -> None:
    with pytest.raises(ModelError, match="only its encoder 'encoder'"):
        head_modules(Headless(), adapter())


def test_a_head_that_is_not_trained_has_no_parameters_in_the_state() -> None:
    assert head_parameters(vit(), adapter(train_head=False)) == []
    shape = model_shape(vit(), make_recipe(adapter__train_head=False))
    assert (shape.head, shape.head_params) == ((), 0)


def test_the_parameters_of_a_vit_are_those_counted_by_hand() -> None:
    shape = model_shape(vit(), make_recipe())
    # class token 16, positions (4 + 1) * 16, patches 16 * 16 pixels + 16
    embeddings = 16 + 5 * 16 + (16 * 16 + 16)
    # q, k, v, o; two layer norms; fc1 and fc2
    layer = 4 * (16 * 16 + 16) + 2 * 32 + (24 * 16 + 24) + (16 * 24 + 16)
    head = 16 * CLASSES + CLASSES
    assert shape.head_params == head
    assert shape.total_params == embeddings + 2 * layer + 32 + head
    assert shape.base_params == embeddings + 2 * layer + 32
    assert shape.head == ("classifier.weight", "classifier.bias")
    assert set(shape.modules.values()) == {ModuleShape(d_in=16, d_out=16)}


def test_the_parameters_of_a_bert_are_those_that_torch_counts() -> None:
    net = bert()
    shape = model_shape(net, make_recipe())
    assert shape.total_params == sum(p.numel() for p in net.parameters())
    assert shape.head_params == sum(p.numel() for p in net.classifier.parameters())


def test_a_module_of_unequal_sides_keeps_them_apart() -> None:
    # fc1 maps 16 to 24: its weight is 24 x 16.
    shape = model_shape(vit(), make_recipe(adapter__target_modules=["layers.0.mlp.fc1"]))
    assert dict(shape.modules) == {"vit.layers.0.mlp.fc1": ModuleShape(d_in=16, d_out=24)}


def test_a_model_without_weights_has_the_shape_of_the_real_one() -> None:
    with torch.device("meta"):
        hollow = vit()
    found = model_shape(hollow, make_recipe())
    # Only a model without values is traced.
    assert replace(
        found, linear_flops=0.0, activation_bytes=0, checkpointed_bytes=0
    ) == model_shape(vit(), make_recipe())


@pytest.mark.parametrize("max_length", [12, 14])
def test_a_model_that_keeps_positions_first_is_seen_whatever_it_is_made_of(max_length: int) -> None:
    # XLNet makes its parameters itself, not where torch is told to; 14 is twice the trace's batch.
    config = XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=24)
    recipe = make_recipe(
        model__task="text-classification",
        data__max_length=max_length,
        adapter__target_modules="all-linear",
    )
    found = model_shape(skeleton(recipe.model, config), recipe)
    assert found.obstacle == "the model does not keep a batch's examples in the first dimension"


def test_the_largest_rank_that_fits_is_the_smaller_side() -> None:
    targets = {"adapter__target_modules": ["layers.0.mlp.fc1"]}
    model_shape(vit(), make_recipe(annealing__heating__rank=16, **targets))
    with pytest.raises(ModelError, match=r"at most 16.*fc1 \(24 x 16\), got 17"):
        model_shape(vit(), make_recipe(annealing__heating__rank=17, **targets))


def test_a_full_model_method_has_no_rank_to_check() -> None:
    recipe = make_recipe(annealing__mode="full", annealing__heating__rank=1000)
    assert len(model_shape(vit(), recipe).modules) == 4
