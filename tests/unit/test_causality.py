"""A language model that sees the tokens it is to predict is refused, before a weight is read."""

from __future__ import annotations

from typing import Any

import pytest

from rayfed_lora.errors import ModelError
from rayfed_lora.launching.planning import plan
from rayfed_lora.models import base_models
from rayfed_lora.models.causality import check_causal
from rayfed_lora.recipe.model import Model
from tests.unit.test_language_models import RECIPE, texts

__all__ = ["texts"]

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def check(architecture: str, **config: Any) -> None:
    model = Model(task="causal-lm", config={"architecture": architecture, **config})
    check_causal(model, base_models.configuration(model, {}))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra", "camembert"])
def test_an_encoder_is_refused_and_its_switch_is_named(architecture):
    with pytest.raises(ModelError, match=rf"{architecture} sees the tokens.*is_decoder: true"):
        check(architecture, **SMALL)
    check(architecture, **SMALL, is_decoder=True)


def test_a_switch_of_another_name_is_named():
    sizes = {"emb_dim": 16, "n_layers": 1, "n_heads": 2}
    with pytest.raises(ModelError, match=r"xlm sees the tokens.*\{causal: true\}, with which"):
        check("xlm", **sizes)
    check("xlm", **sizes, causal=True)


def test_an_encoder_without_a_switch_that_helps_is_refused_without_one():
    with pytest.raises(ModelError, match=r"xlnet sees the tokens.*choose a decoder"):
        check("xlnet", d_model=16, n_layer=1, n_head=2, d_inner=24)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "mamba"])
def test_a_decoder_of_any_size_passes(architecture):
    check(architecture)


def test_random_numbers_of_the_run_are_not_drawn():
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check("llama", **SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_plan_refuses_it(texts):
    model = {"task": "causal-lm", "tokenizer": str(texts / "tokenizer")}
    encoder = {"architecture": "bert", **{k: v for k, v in SMALL.items() if k != "vocab_size"}}
    given = {**RECIPE, "data": {**RECIPE["data"], "source": str(texts / "texts.jsonl")}}
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        plan({**given, "model": {**model, "config": encoder}})
    assert plan({**given, "model": {**model, "config": {**encoder, "is_decoder": True}}}).rounds
