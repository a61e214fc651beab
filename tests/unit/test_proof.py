"""What a plan says of fusing, without weights and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rayfed_lora.models import sources
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.training import proof
from rayfed_lora.training.proof import foreseen
from rayfed_lora.types import ModelShape
from tests.fakes import make_recipe

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MIXES = "the model mixes padding into its result: without it, a text has other logits"
NOTE = f"evaluation.batch_size may change the results of evaluations: {MIXES}"


def planned(architecture: str, **overrides: Any) -> ModelShape:
    config = AutoConfig.for_model(architecture, **SIZES)
    recipe = make_recipe(
        model__task="text-classification", adapter__target_modules="all-linear", **overrides
    )
    return foreseen(config, model_shape(sources.skeleton(recipe.model, config), recipe), recipe)


def test_a_plan_of_a_small_model_tells_what_the_run_will_find() -> None:
    assert (planned("bert").obstacle, planned("bert").notes) == (None, ())
    assert (planned("fnet").obstacle, planned("fnet").notes) == (MIXES, (NOTE,))


def test_where_clients_train_alone_anyhow_what_is_mixed_is_noted() -> None:
    found = planned("fnet", annealing__mode="full")
    assert (found.obstacle, found.notes) == (None, (NOTE,))


def test_a_plan_of_a_large_model_says_that_the_run_will_try_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof, "_MOST_DRAWN", 100)
    found = planned("fnet")
    assert found.obstacle is None
    assert "is tried when the run starts" in found.notes[0]
    assert planned("fnet", annealing__mode="full").notes == ()


def test_a_plan_leaves_torchs_own_stream_of_random_numbers_as_it_was() -> None:
    before = torch.get_rng_state()
    planned("bert")
    assert torch.equal(torch.get_rng_state(), before)
