"""The last layer of an encoder, computed for the one token that its head reads.

Classifiers of the ViT and BERT families read the first token alone. Of the other tokens, the layer
computes keys and values only: about a quarter of its work. Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayfed_lora.models.attention import KEYS_FIRST
from rayfed_lora.models.linear import nearly_equal

# Attention of these implementations takes masks that are added or true where a token is seen.
_PLAIN_MASKS = ("eager", "sdpa", KEYS_FIRST)


def read_first_token_only(net: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Let the last layer compute what the head reads, where that is the first token only.

    The classifier is changed in place; its parameters keep their names.

    Returns:
        Whether it was changed: not where its layers are of an unknown kind or causal, or where the
        logits of `inputs` would differ.
    """
    config: Any = net.config
    layer: Any = _last_layer(net)
    forward = _FORWARD_OF.get(type(layer).__name__)
    # A decoder's layer may be causal without a mask.
    decoder, masks = getattr(config, "is_decoder", False), config._attn_implementation
    if forward is None or decoder or masks not in _PLAIN_MASKS:
        return False
    mode = net.training
    net.eval()
    with torch.no_grad():
        expected = net(**inputs).logits
        # Hides the class's own forward, until it is deleted.
        layer.forward = partial(forward, layer)
        try:
            same = nearly_equal(net(**inputs).logits, expected)
        except (IndexError, ValueError, RuntimeError):  # its head reads other tokens
            same = False
    if not same:
        del layer.forward
    net.train(mode)
    return same


def _last_layer(net: nn.Module) -> nn.Module | None:
    """Return the encoder's last layer, where it has exactly one list of modules."""
    encoder = getattr(net, getattr(net, "base_model_prefix", ""), None)
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)] if encoder else []
    return lists[0][-1] if len(lists) == 1 and len(lists[0]) > 0 else None


def _vit(
    layer: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return the first token after a layer that normalises before each part, (batch, 1, d)."""
    own = layer.attention
    parts = (own.q_proj, own.k_proj, own.v_proj)
    drop, seen = own.attention_dropout, layer.layernorm_before(hidden)
    read = _attended(own, parts, seen, attention_mask, own.head_dim, drop)
    first = hidden[:, :1] + layer.dropout(own.o_proj(read))
    return first + layer.dropout(layer.mlp(layer.layernorm_after(first)))  # type: ignore[no-any-return]


def _bert(
    layer: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """Return the first token after a layer that normalises after each part, (batch, 1, d)."""
    own = layer.attention.self
    parts, head = (own.query, own.key, own.value), own.attention_head_size
    read = _attended(own, parts, hidden, attention_mask, head, own.dropout.p)
    return layer.feed_forward_chunk(layer.attention.output(read, hidden[:, :1]))  # type: ignore[no-any-return]


def _distilbert(
    layer: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return the result of `_bert` for a layer with other names."""
    own = layer.attention
    parts, head = (own.q_lin, own.k_lin, own.v_lin), own.attention_head_size
    read = _attended(own, parts, hidden, attention_mask, head, own.dropout.p)
    first = layer.sa_layer_norm(own.out_lin(read) + hidden[:, :1])
    return layer.output_layer_norm(layer.ffn(first) + first)  # type: ignore[no-any-return]


def _attended(
    own: nn.Module,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    seen: torch.Tensor,
    mask: torch.Tensor | None,
    head_size: int,
    dropout: float,
) -> torch.Tensor:
    """Return the first token's attention to all of `seen`, (batch, tokens, d), as (batch, 1, d).

    `projections` are those of queries, keys and values; the output projection is not applied. The
    mask is (batch or 1, heads or 1, tokens or 1, tokens) as transformers makes it.
    """
    query, key, value = projections
    projected = (query(seen[:, :1]), key(seen), value(seen))
    q, k, v = (x.view(*x.shape[:2], -1, head_size).transpose(1, 2) for x in projected)
    first = None if mask is None else mask[:, :, :1]
    rate = dropout if own.training else 0.0
    read = functional.scaled_dot_product_attention(q, k, v, attn_mask=first, dropout_p=rate)
    return read.transpose(1, 2).flatten(2)


_BERTS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")
_FORWARD_OF: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(_BERTS, _bert),
    **dict.fromkeys(("ViTLayer", "DeiTLayer"), _vit),
    "TransformerBlock": _distilbert,
}
