"""The last layer computes what the head reads, and nothing changes by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from rayfed_lora.models.first_token import read_first_token_only

HIDDEN, MIDDLE, TOKENS, BATCH = 16, 24, 9, 3
WIDTHS = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": MIDDLE,
    # Weights large enough for logits far above the rounding.
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TEXT = {**WIDTHS, "vocab_size": 30, "max_position_embeddings": 20, "pad_token_id": 1}
IMAGE = {**WIDTHS, "image_size": 8, "patch_size": 4, "num_channels": 1}
DISTIL = {
    **{"dim": HIDDEN, "hidden_dim": MIDDLE, "n_layers": 2, "n_heads": 2, "vocab_size": 30},
    **{"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}
READERS: dict[str, dict[str, Any]] = {
    "vit": IMAGE,
    "deit": {**IMAGE, "architectures": ["DeiTForImageClassification"]},
    "bert": TEXT,
    "roberta": TEXT,
    "xlm-roberta": TEXT,
    "camembert": TEXT,
    "electra": TEXT,
    "distilbert": DISTIL,
}


def classifier(name: str, values: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    image = "image_size" in values
    auto = AutoModelForImageClassification if image else AutoModelForSequenceClassification
    return auto.from_config(AutoConfig.for_model(name, num_labels=3, **values))


def examples(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return images, or texts of which the second is padded."""
    rng = np.random.default_rng(0)
    if hasattr(net.config, "image_size"):
        pixels = rng.normal(size=(BATCH, net.config.num_channels, 8, 8)).astype(np.float32)
        return {"pixel_values": torch.from_numpy(pixels)}
    ids = torch.from_numpy(rng.integers(2, 30, (BATCH, TOKENS)))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(net: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    net.zero_grad()
    net(**inputs).logits[:, 1].sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", READERS)
def test_logits_and_all_gradients_stay_the_same(name: str, attention: str) -> None:
    net = classifier(name, READERS[name])
    net.set_attn_implementation(attention)
    inputs = examples(net)
    logits, each = net(**inputs).logits, gradients(net, inputs)
    assert read_first_token_only(net, inputs)
    torch.testing.assert_close(net(**inputs).logits, logits, rtol=1e-5, atol=1e-6)
    after = gradients(net, inputs)
    assert set(after) == set(each)
    for parameter, gradient in each.items():
        torch.testing.assert_close(after[parameter], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "bert", "distilbert"])
def test_only_keys_and_values_of_the_last_layer_see_all_tokens(name: str) -> None:
    net = classifier(name, READERS[name])
    inputs = examples(net)
    read_first_token_only(net, inputs)
    tokens: dict[str, int] = {}

    def look(module: str) -> Any:
        return lambda _, seen, __: tokens.update({module: seen[0].shape[1]})

    for module, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and ".1." in module:
            layer.register_forward_hook(look(module))
    net(**inputs)
    # Query, key, value, output, and two of the feed-forward part.
    assert len(tokens) == 6
    all_tokens = 5 if name == "vit" else TOKENS
    seen = {module.rpartition(".")[2]: count for module, count in tokens.items() if count > 1}
    assert set(seen.values()) == {all_tokens}
    assert set(seen) in ({"k_proj", "v_proj"}, {"key", "value"}, {"k_lin", "v_lin"})


def test_dropout_of_the_attention_leaves_out_what_it_should() -> None:
    net = classifier("bert", {**TEXT, "attention_probs_dropout_prob": 1.0})
    inputs = examples(net)
    assert read_first_token_only(net, inputs)
    values = net.bert.encoder.layer[-1].attention.self.value
    net.train()
    before = net(**inputs).logits
    # All of the attention is dropped: what it would have read does not matter any more.
    values.weight.data.mul_(2.0)
    torch.testing.assert_close(net(**inputs).logits, before)
    net.eval()
    assert not torch.allclose(net(**inputs).logits, before)


class MeanReader(nn.Module):
    """A ViT whose head reads the mean over all tokens."""

    base_model_prefix = "vit"

    def __init__(self) -> None:
        super().__init__()
        whole = classifier("vit", IMAGE)
        self.vit, self.config, self.classifier = whole.vit, whole.config, whole.classifier

    def forward(self, pixel_values: torch.Tensor) -> Any:
        read = self.vit(pixel_values).last_hidden_state.mean(dim=1)
        return type("Output", (), {"logits": self.classifier(read)})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # Its second head reads the second token.
        ("deit", {**IMAGE, "architectures": ["DeiTForImageClassificationWithTeacher"]}),
        # Its feed-forward part wants three tokens at a time.
        ("distilbert", {**DISTIL, "chunk_size_feed_forward": 3}),
        # The first token sees itself only.
        ("bert", {**TEXT, "is_decoder": True}),
    ],
)
def test_a_layer_that_cannot_do_with_one_token_is_left_as_it_is(
    name: str, values: dict[str, Any]
) -> None:
    net = classifier(name, values).eval()
    inputs = examples(net)
    before = net(**inputs).logits
    assert not read_first_token_only(net, inputs)
    assert torch.equal(net(**inputs).logits, before)


def test_a_model_that_reads_other_tokens_is_left_as_it_is() -> None:
    net = MeanReader()
    inputs = examples(net)
    before = net(**inputs).logits
    assert not read_first_token_only(net, inputs)
    assert torch.equal(net(**inputs).logits, before)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # Its layers are of no known kind.
        ("modernbert", {**TEXT, "cls_token_id": 0, "sep_token_id": 0, "eos_token_id": 0}),
        # It has several lists of layers.
        ("mobilevit", {"image_size": 32, "num_channels": 1}),
    ],
)
def test_unknown_models_are_left_as_they_are(name: str, values: dict[str, Any]) -> None:
    net = classifier(name, values)
    assert not read_first_token_only(net, {})
    assert all("forward" not in vars(module) for module in net.modules())


def test_the_mode_of_a_model_comes_back() -> None:
    for training in (True, False):
        net = classifier("vit", IMAGE).train(training)
        read_first_token_only(net, examples(net))
        assert net.training is training
