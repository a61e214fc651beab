"""Which layers get factors, and what is said of those that do not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from rayfed_lora.errors import ModelError
from rayfed_lora.models.heads import head_modules, head_notes, head_parameters
from rayfed_lora.models.linear import unsuitable
from rayfed_lora.models.shapes import adapted_modules, model_shape
from rayfed_lora.models.targets import choose_targets
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.types import ModelShape
from tests.fakes import make_recipe

WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 30}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 30, **ENDS}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 1,
}
TEXT, CAUSAL, IMAGE = (
    AutoModelForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)
DEBERTA = {**WIDTHS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
TASKS = {TEXT: "text-classification", CAUSAL: "causal-lm", IMAGE: "image-classification"}


def hollow(auto: Any, architecture: str, **values: Any) -> nn.Module:
    """Return a model without values."""
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(architecture, **values)).to("meta")


def two_sided(architecture: str) -> nn.Module:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 24, "vocab_size": 30, **ENDS}
    return hollow(IMAGE, architecture, vision_config=VISION, text_config=text)


def resnet() -> nn.Module:
    return hollow(IMAGE, "resnet", num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1])


def adapter(**values: Any) -> Adapter:
    return Adapter.model_validate(values)


def shape_of(net: nn.Module, auto: Any, targets: Any, **overrides: Any) -> ModelShape:
    values = {"adapter__target_modules": targets, "data__max_length": 12, **overrides}
    return model_shape(net, make_recipe(model__task=TASKS[auto], **values))


def endings(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("auto", "architecture", "values", "expected"),
    [
        (TEXT, "deberta", DEBERTA, {"in_proj"}),
        (TEXT, "deberta-v2", DEBERTA, {"query_proj", "value_proj"}),
        (CAUSAL, "gpt_neox", WIDTHS, {"query_key_value"}),
        (
            CAUSAL,
            "falcon",
            {k: v for k, v in WIDTHS.items() if k != "intermediate_size"},
            {"query_key_value"},
        ),
        (CAUSAL, "phi3", WIDTHS, {"qkv_proj"}),
        (CAUSAL, "gpt2", {**GPT2, **ENDS}, {"c_attn"}),
        (CAUSAL, "mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 30}, {"Wqkv"}),
        (CAUSAL, "ctrl", {**GPT2, "dff": 24}, {"Wq", "Wv"}),
    ],
)
def test_auto_knows_the_query_and_value_projections_of_many_kinds(
    auto: Any, architecture: str, values: dict[str, Any], expected: set[str]
) -> None:
    assert endings(adapted_modules(hollow(auto, architecture, **values), adapter())) == expected


def test_auto_does_not_take_a_state_space_models_projection_for_attention() -> None:
    with pytest.raises(ModelError, match=r"auto finds no query and value projections; .*in_proj"):
        adapted_modules(hollow(CAUSAL, "mamba", **MAMBA), adapter())


LLAMA = ("llama", WIDTHS)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "v_porj"], r"'v_porj' matches nothing \(did you mean 'v_proj'\?\)"),
        (["q_proj", "lm_head"], r"'lm_head' matches nothing outside of the head"),
        (["q_proj", "input_layernorm"], r"input_layernorm' is LlamaRMSNorm"),
        (["q_proj", "wholly_other"], r"'wholly_other' matches nothing; the model's linear"),
        (
            ["self_atn.q_proj"],
            r"'self_atn.q_proj' matches nothing \(did you mean 'self_attn.q_proj'",
        ),
        ("all_linear", r"'all_linear' matches nothing \(did you mean 'all-linear'\?\)"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_entry_of_a_list_names_a_layer_that_can_be_adapted(
    targets: Any, said: str, tied: bool
) -> None:
    net = hollow(CAUSAL, "llama", **WIDTHS, tie_word_embeddings=tied)
    with pytest.raises(ModelError, match=said):
        adapted_modules(net, adapter(target_modules=targets, train_head=False))


def test_a_module_that_two_entries_name_is_adapted_once() -> None:
    net = hollow(CAUSAL, "llama", **WIDTHS)
    chosen = adapter(target_modules=["q_proj", "q_proj", "self_attn.q_proj"], train_head=False)
    assert adapted_modules(net, chosen) == ["model.layers.0.self_attn.q_proj"]


def test_a_target_in_the_encoder_and_in_the_head_is_adapted_in_the_encoder_and_noted() -> None:
    net = hollow(TEXT, "roberta", **WIDTHS)
    found = shape_of(net, TEXT, ["dense"])
    assert all(name.startswith("roberta.") for name in found.modules)
    assert found.notes == (
        "adapter.target_modules: classifier.dense is part of the head and gets no factors",
    )


def test_all_linear_leaves_layers_smaller_than_the_rank_out_and_names_them() -> None:
    # ConvBERT's kernels: 16 values to heads * 3 taps = 1 * 3.
    config = {**WIDTHS, "embedding_size": 16, "head_ratio": 2, "conv_kernel_size": 3}
    net = hollow(TEXT, "convbert", **config)
    all_of_them = shape_of(net, TEXT, "all-linear", annealing__heating__rank=3)
    found = shape_of(net, TEXT, "all-linear", annealing__heating__rank=4)
    assert endings(all_of_them.modules.keys() - found.modules.keys()) == {"conv_kernel_layer"}
    assert found.notes == (
        "adapter.target_modules: attention.self.conv_kernel_layer left out: smaller than"
        " annealing.heating.rank 4",
    )
    with pytest.raises(ModelError, match=r"annealing\.heating\.rank: expected at most 3"):
        shape_of(net, TEXT, ["conv_kernel_layer", "query"], annealing__heating__rank=4)


def test_a_router_with_a_forward_of_its_own_gets_no_factors() -> None:
    net = hollow(CAUSAL, "phimoe", **WIDTHS, num_key_value_heads=1, num_local_experts=2)
    found = choose_targets(net, "all-linear", ["lm_head"])
    assert endings(found.names) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "PhimoeTopKRouter has a forward of its own" in found.notes[0]
    with pytest.raises(ModelError, match=r"'router' matches mlp\.router, which cannot get factors"):
        choose_targets(net, ["q_proj", "router"], ["lm_head"])


def test_a_subclass_that_computes_what_a_plain_layer_does_gets_factors() -> None:
    # FalconLinear writes x @ W^T + bias by itself.
    values = {k: v for k, v in WIDTHS.items() if k != "intermediate_size"}
    assert unsuitable(hollow(TEXT, "falcon", **values)) == {}


@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba"])
def test_what_peft_rejects_is_left_out_or_rejected(architecture: str) -> None:
    net = hollow(CAUSAL, architecture, **MAMBA)
    found = choose_targets(net, "all-linear", ["lm_head"])
    assert "out_proj" not in endings(found.names)
    assert any(f"PEFT rejects it in a model of type {architecture}" in n for n in found.notes)
    with pytest.raises(ModelError, match=r"'out_proj' .* PEFT rejects it"):
        choose_targets(net, ["in_proj", "out_proj"], ["lm_head"])
    # PEFT itself says so.
    with pytest.raises(ValueError, match="out_proj"):
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["out_proj"]), net)
    inject_adapter_in_model(LoraConfig(r=1, target_modules=found.names), net)


def test_a_layer_that_the_model_never_calls_gets_no_factors() -> None:
    net = hollow(TEXT, "esm", **WIDTHS, mask_token_id=3)
    found = shape_of(net, TEXT, "all-linear", annealing__heating__rank=1)
    assert "regression" not in endings(found.modules)
    assert found.notes == (
        "adapter.target_modules: esm.contact_head.regression left out: the model never calls it",
    )
    with pytest.raises(ModelError, match=r"'regression' .* the model never calls it"):
        shape_of(net, TEXT, ["query", "regression"], annealing__heating__rank=1)


class Tied(nn.Module):
    """Two layers of one weight, a layer in two places, and an attention of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.two.weight = self.one.weight
        self.pair = nn.ModuleList([nn.Linear(4, 4)] * 2)
        self.attention = nn.MultiheadAttention(4, 2)


def test_layers_with_a_weight_that_is_used_elsewhere_get_no_factors() -> None:
    found = choose_targets(Tied(), "all-linear", ["head"])
    assert found.names == ["free"]
    assert found.notes == (
        "adapter.target_modules: one, two, pair.0 left out: its weight is shared with another"
        " module",
        "adapter.target_modules: attention.out_proj left out: nn.MultiheadAttention reads its"
        " weight and never calls it",
    )


@pytest.mark.parametrize("architecture", ["siglip", "clip"])
def test_an_encoder_beside_the_base_models_name_is_not_the_head(architecture: str) -> None:
    net = two_sided(architecture)
    assert head_modules(net, adapter()) == ["classifier"]
    assert re.search(f"no module '{architecture}'.*'vision_model'", head_notes(net, adapter())[0])
    found = shape_of(net, IMAGE, "all-linear")
    assert found.head == ("classifier.weight", "classifier.bias")
    assert {"q_proj", "k_proj", "v_proj", "fc1", "fc2"} <= endings(found.modules)


def test_what_is_registered_before_the_largest_part_is_not_the_head() -> None:
    net = nn.Sequential()
    net.add_module("embedder", nn.Linear(4, 8))
    net.add_module("encoder", nn.Linear(8, 8))
    net.add_module("fc", nn.Linear(8, 2))
    assert head_modules(net, adapter()) == ["fc"]


def test_head_modules_within_each_other_are_rejected_and_equal_ones_are_one() -> None:
    net = hollow(TEXT, "roberta", **WIDTHS)
    with pytest.raises(ModelError, match=r"'classifier\.dense' is part of 'classifier'"):
        head_modules(net, adapter(head_modules=["classifier", "classifier.dense"]))
    assert head_modules(net, adapter(head_modules=["classifier"] * 2)) == ["classifier"]


def test_a_head_whose_weights_are_all_the_encoders_cannot_be_trained() -> None:
    net = hollow(CAUSAL, "gpt2", **GPT2, **ENDS)
    with pytest.raises(
        ModelError, match=r"adapter\.train_head: the weights of lm_head .* \(tied\)"
    ):
        head_parameters(net, adapter(train_head=True))
    assert head_parameters(net, adapter(train_head=False)) == []


@pytest.mark.parametrize(
    "method",
    [{"annealing__mode": "full"}, {"annealing__mode": "fixed", "annealing__heating__rank": 0}],
    ids=["full", "rank 0"],
)
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_a_method_without_factors_needs_no_targets(targets: str, method: dict[str, Any]) -> None:
    found = shape_of(resnet(), IMAGE, targets, **method)
    assert (dict(found.modules), found.notes) == ({}, ())
    assert found.head == ("classifier.1.weight", "classifier.1.bias")
    with pytest.raises(ModelError, match="'q_proj' matches nothing"):
        shape_of(resnet(), IMAGE, ["q_proj"], **method)


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_a_method_with_factors_needs_targets(targets: str) -> None:
    with pytest.raises(ModelError, match="the model has none outside of its head"):
        shape_of(resnet(), IMAGE, targets)
