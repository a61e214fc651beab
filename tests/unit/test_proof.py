"""What a plan says of fusing, without weights and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from rayfed_lora.data.examples import Examples
from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.mixing import Verdict
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.models.tokens import pad_with
from rayfed_lora.training import proof
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.proof import examined, judged_without_weights
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.training.weights import built_weights
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


def planned(architecture: str, sizes: Mapping[str, Any] = SIZES, **overrides: Any) -> ModelShape:
    config = AutoConfig.for_model(architecture, **sizes)
    recipe = make_recipe(
        model__task="text-classification", adapter__target_modules="all-linear", **overrides
    )
    shape = model_shape(base_models.skeleton(recipe.model, config), recipe)
    ids = np.arange(1, 29, dtype=np.int32) * (np.arange(28) < np.array([[2], [16], [28]]))
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int32)}
    examples = Examples.of(inputs, np.zeros(3, np.int64))
    return judged_without_weights(shape, config, examples, recipe)


def test_a_plan_of_a_small_model_tells_what_the_run_will_find() -> None:
    assert (planned("bert").obstacle, planned("bert").notes) == (None, ())
    assert (planned("fnet").obstacle, planned("fnet").notes) == (MIXES, (NOTE,))


def test_where_clients_train_alone_anyhow_what_is_mixed_is_noted() -> None:
    found = planned("fnet", annealing__mode="full")
    assert (found.obstacle, found.notes) == (None, (NOTE,))


def test_a_plan_of_a_large_model_says_that_the_run_will_try_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof, "_MOST_RANDOM", 100)
    found = planned("fnet")
    assert found.obstacle is None
    assert "is tested when the run starts" in found.notes[0]
    assert planned("fnet", annealing__mode="full").notes == ()


def test_a_plan_leaves_torchs_own_stream_of_random_numbers_as_it_was() -> None:
    before = torch.get_rng_state()
    planned("bert")
    assert torch.equal(torch.get_rng_state(), before)


class Recording(nn.Module):
    """Gives each text the sum of its tokens, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.seen.append((input_ids.tolist(), attention_mask.tolist()))
        total = (input_ids * attention_mask).sum(1, keepdim=True)
        return SimpleNamespace(logits=torch.cat([total, -total], 1).float())


def texts(*lengths: int) -> Examples:
    """Return texts of the tokens 1, 2, ..., each with the end token 9999."""
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    ids = np.arange(1, max(lengths) + 1, dtype=np.int32) * mask
    for i, length in enumerate(lengths):
        ids[i, length - 1] = 9999
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Examples.of(inputs, np.zeros(len(lengths), np.int64))


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((6, 20, 64), [6, 20, 64]),
        # 1000 tokens become 64, the others as large a share: 500 * 64 / 1000, but 8 at least.
        ((500, 3, 1000), [3, 32, 64]),
        ((20, 500, 1000), [8, 32, 64]),
        # 999 * 64 / 1000 = 63.9: a text that is padded stays so.
        ((999, 1000, 1000), [63, 64, 64]),
        ((700, 700, 700), [64, 64, 64]),
    ],
)
def test_long_texts_are_tried_by_their_first_tokens_and_their_end(
    lengths: tuple[int, ...], kept: list[int]
) -> None:
    net = Recording()
    assert examined(net, texts(*lengths)).testing is None
    ids, mask = max(net.seen, key=lambda given: len(given[0]))
    assert [sum(row) for row in mask] == kept
    assert {len(row) for row in ids} == {64}
    for row, tokens in zip(ids, kept, strict=True):
        assert row[:tokens] == [*range(1, tokens), 9999]
        assert not any(row[tokens:])


def test_texts_of_a_model_that_attends_to_blocks_are_not_cut() -> None:
    # Of short texts it would show its full attention, which mixes nothing in.
    net = Recording()
    net.config = SimpleNamespace(attention_type="block_sparse", to_dict=dict)  # type: ignore[assignment]
    examined(net, texts(20, 100, 200))
    assert {len(ids[0]) for ids, _ in net.seen} == {20, 100, 200}


def test_padding_that_is_mixed_in_is_found_with_long_texts() -> None:
    config = AutoConfig.for_model("fnet", **SIZES | {"max_position_embeddings": 512})
    net = base_models.randomly_initialised(
        make_recipe(model__task="text-classification").model, config
    )
    draw = np.random.default_rng(0).integers(1, 30, (3, 300)).astype(np.int32)
    mask = (np.arange(300) < np.array([[295], [298], [300]])).astype(np.int32)
    labels = np.zeros(3, np.int64)
    found = examined(net, Examples.of({"input_ids": draw * mask, "attention_mask": mask}, labels))
    assert found.testing == found.training == MIXES


ENDED: dict[str, dict[str, Any]] = {
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
    },
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24},
}


@pytest.mark.parametrize("kind", ENDED)
def test_a_model_that_cannot_compute_an_example_is_refused_before_anything_starts(
    kind: str,
) -> None:
    special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "vocab_size": 30}
    config = AutoConfig.for_model(kind, **ENDED[kind], **special, decoder_start_token_id=0)
    net = base_models.randomly_initialised(
        make_recipe(model__task="text-classification").model, config
    )
    ids = np.array([[0, 0, 0, 0], [5, 6, 2, 0], [7, 8, 9, 2]], np.int32)
    mask = (ids > 0).astype(np.int32)
    labels = np.zeros(3, np.int64)
    ended = Examples.of({"input_ids": ids[1:], "attention_mask": mask[1:]}, labels[1:])
    assert examined(net, ended).testing is None
    told = r"cannot compute an example of the data: .*<eos>"
    # A text without tokens becomes one of padding: it has no end.
    empty = pad_with({"input_ids": ids, "attention_mask": mask}, 0)
    with pytest.raises(ModelError, match=told):
        examined(net, Examples.of(empty, labels))
    without = np.where(ids == 2, 3, ids)[1:]
    with pytest.raises(ModelError, match=told):
        examined(net, Examples.of({"input_ids": without, "attention_mask": mask[1:]}, labels[1:]))


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 60,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize("place", ["text_config", "vision_config"])
def test_a_plan_tries_a_model_with_inner_configurations(place: str) -> None:
    inner = {"text_config": TEXT, "vision_config": VISION}
    inner[place] = {**inner[place], "attention_dropout": 0.1}
    found = planned("gemma3", {**inner, "pad_token_id": 0})
    assert found.obstacle is None
    assert not any("is tested when the run starts" in note for note in found.notes)


def test_a_model_that_cannot_compute_very_short_texts_alone_is_tried_on_the_others() -> None:
    sizes = {"block_sizes": [1, 1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}
    found = planned("funnel", {**sizes, "vocab_size": 50, "pad_token_id": 0})
    assert (found.obstacle, found.notes) == (None, ())


def test_trainers_that_share_weights_share_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"model__config": {"architecture": "vit", **VISION, "image_size": 8, "patch_size": 4}}
    recipe = make_recipe(data__max_examples=20, **own)
    workload = prepare(recipe)
    weights = built_weights(recipe, workload)
    assert weights.verdict == Verdict()

    def unexpected(*_: Any) -> Verdict:
        raise AssertionError("tried again")

    monkeypatch.setattr("rayfed_lora.training.weights.tried_on", unexpected)
    assert LocalTrainer(recipe, workload, weights=weights).shape().obstacle is None
    query = next(iter(LocalTrainer(recipe, workload, weights=weights).shape().modules))
    for verdict, obstacle, notes in (
        (Verdict("why", "why"), "why", 1),
        (Verdict(training="why"), "why", 0),
        (Verdict(layers={query: "why"}), "why", 0),
        (Verdict(heads={"classifier": "why"}), "why", 0),
        (Verdict(layers={"not adapted": "why"}, heads={query: "why"}), None, 0),
    ):
        shape = LocalTrainer(recipe, workload, weights=replace(weights, verdict=verdict)).shape()
        assert (shape.obstacle, len(shape.notes)) == (obstacle, notes)
