"""Attention with a key's scores in a row is what torch's own attention computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification

from rayfed_lora.models.attention import KEYS_FIRST, choose_attention, keys_first

BATCH, HEADS, TOKENS, WIDTH = 3, 2, 5, 4


def projections() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = (BATCH, TOKENS, HEADS, WIDTH)
    return [torch.randn(shape, requires_grad=True).transpose(1, 2) for _ in range(3)]


def vit(patch_size: int) -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "vit", image_size=16, patch_size=patch_size, intermediate_size=8, num_channels=1, **sizes
    )
    return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_values_and_gradients_are_those_of_torchs_attention(scaling: float | None) -> None:
    parts = projections()
    found, weights = keys_first(nn.Identity(), *parts, None, scaling=scaling)
    expected = functional.scaled_dot_product_attention(*parts, scale=scaling).transpose(1, 2)
    assert weights is None
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(found)
    own, other = (torch.autograd.grad(each, parts, pull) for each in (found, expected))
    for gradient, wanted in zip(own, other, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_a_masked_token_is_not_seen() -> None:
    parts = projections()
    mask = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool)
    mask[..., -1] = False
    found, _ = keys_first(nn.Identity(), *parts, mask)
    query, key, value = parts
    expected, _ = keys_first(nn.Identity(), query, key[:, :, :-1], value[:, :, :-1], None)
    torch.testing.assert_close(found, expected)


def test_a_causal_module_sees_no_later_token() -> None:
    module = nn.Identity()
    module.is_causal = True
    query, key, value = projections()
    found, _ = keys_first(module, query, key, value, None)
    # The first token sees itself only.
    torch.testing.assert_close(found[:, 0], value[:, :, 0])


def test_all_of_the_attention_can_be_dropped() -> None:
    module = nn.Identity().train()
    found, _ = keys_first(module, *projections(), None, dropout=1.0)
    assert torch.count_nonzero(found) == 0
    found, _ = keys_first(module.eval(), *projections(), None, dropout=1.0)
    assert torch.count_nonzero(found) == found.numel()


def test_it_is_chosen_for_short_sequences_of_images_on_a_cpu() -> None:
    pixels = torch.randn(2, 1, 16, 16)
    short, long, on_gpu = vit(4), vit(2), vit(4)
    before = short(pixels).logits
    for net, device in ((short, "cpu"), (long, "cpu"), (on_gpu, "cuda")):
        choose_attention(net, torch.device(device))
    assert short.config._attn_implementation == KEYS_FIRST
    assert long.config._attn_implementation == on_gpu.config._attn_implementation == "sdpa"
    torch.testing.assert_close(short(pixels).logits, before)
