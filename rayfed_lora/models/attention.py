"""Choice of a model's attention. Source: this project; eq. 1 of arXiv:1706.03762."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayfed_lora.models.quiet import quiet

# Up to this length, torch's attention kernel for the CPU is slower than three plain products.
_SHORT = 32
KEYS_FIRST = "rayfed_lora_keys_first"


def choose_attention(net: nn.Module, device: torch.device) -> None:
    """Choose the fastest attention of an image model for the device."""
    config = net.config
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if device.type != "cpu" or not isinstance(size, int) or not isinstance(patch, int):
        return
    if (size // patch) ** 2 < _SHORT and config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        AttentionInterface.register(KEYS_FIRST, keys_first)
        AttentionMaskInterface.register(KEYS_FIRST, sdpa_mask)
        with quiet():
            net.set_attn_implementation(KEYS_FIRST)  # type: ignore[operator]


def keys_first(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Return softmax(scaling Q K^T) V, with the scores of a key in a row: (keys, queries).

    A softmax over short columns takes half the time of one over short rows. With a mask, or for a
    causal module, transformers' own `sdpa` is used.

    The arguments are those of transformers' attentions: query, key and value are (batch, heads,
    tokens, d), `dropout` is the probability of a zero in the attention, `scaling` the factor of the
    scores (None: 1 / sqrt(d)).

    Returns:
        (batch, tokens, heads, d), and no weights.
    """
    if attention_mask is not None or getattr(module, "is_causal", False):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named
        )
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = torch.softmax(key @ (query * factor).transpose(2, 3), dim=2)
    weights = functional.dropout(weights, dropout, module.training)
    return (weights.transpose(2, 3) @ value).transpose(1, 2).contiguous(), None
