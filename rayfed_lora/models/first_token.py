"""The last layer of an encoder, computed for the one token that its head reads.

A classifier of the ViT and BERT families reads the first token of the last layer alone. What that
layer would compute for the other tokens beside keys and values (queries, the attention's output,
the feed-forward part, all their gradients) reaches no loss and no logit, and is left out: about
three quarters of the layer's work. Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayfed_lora.models.attention import KEYS_FIRST

_Forward = Callable[..., torch.Tensor]
# Attention of these implementations takes masks that are added or true where a token is seen.
_PLAIN_MASKS = ("eager", "sdpa", KEYS_FIRST)
# Largest difference of a logit that is rounding, as a share of the largest logit.
_ROUNDING = 1e-4


def read_first_token_only(net: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Let the last layer compute what the head reads, where that is the first token only.

    The parameters stay where they are, under the same names.

    Args:
        net: a classifier of transformers, changed in place.
        inputs: examples to see by that its logits stay the same.

    Returns:
        Whether it was changed. It is not where its layers are of no known kind or see only what
        comes before a token, or where the logits would differ.
    """
    config: Any = net.config
    layer: Any = _last_layer(net)
    forward = None if layer is None else _FORWARD_OF.get(type(layer).__name__)
    if layer is None or forward is None or config._attn_implementation not in _PLAIN_MASKS:
        return False
    if getattr(config, "is_decoder", False):
        # A mask is not always made of it: then only the module knows.
        return False
    mode = net.training
    net.eval()
    with torch.no_grad():
        expected = net(**inputs).logits
        # Beside the class's own, which comes back when this one goes.
        layer.forward = partial(forward, layer)
        try:
            same = _alike(expected, net(**inputs).logits)
        except (IndexError, ValueError, RuntimeError):
            # It looks for other tokens, or cuts the text up.
            same = False
    if not same:
        del layer.forward
    net.train(mode)
    return same


def _last_layer(net: nn.Module) -> nn.Module | None:
    """Return the last of the encoder's layers: of the only list of modules that it holds."""
    encoder = getattr(net, getattr(net, "base_model_prefix", ""), None)
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)] if encoder else []
    return lists[0][-1] if len(lists) == 1 and len(lists[0]) > 0 else None


def _alike(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= _ROUNDING * expected.abs().max())


def _vit(
    layer: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return the first token after a layer that normalises before each part, (batch, 1, d)."""
    own = layer.attention
    seen = layer.layernorm_before(hidden)
    read = _attended(
        own.q_proj(seen[:, :1]),
        own.k_proj(seen),
        own.v_proj(seen),
        attention_mask,
        own.head_dim,
        own.attention_dropout if own.training else 0.0,
    )
    first = hidden[:, :1] + layer.dropout(own.o_proj(read))
    return first + layer.dropout(layer.mlp(layer.layernorm_after(first)))  # type: ignore[no-any-return]


def _bert(
    layer: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """Return the first token after a layer that normalises after each part, (batch, 1, d)."""
    own = layer.attention.self
    read = _attended(
        own.query(hidden[:, :1]),
        own.key(hidden),
        own.value(hidden),
        attention_mask,
        own.attention_head_size,
        own.dropout.p if own.training else 0.0,
    )
    return layer.feed_forward_chunk(layer.attention.output(read, hidden[:, :1]))  # type: ignore[no-any-return]


def _distilbert(
    layer: Any, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return what `_bert` does, of a layer with other names."""
    own = layer.attention
    read = _attended(
        own.q_lin(hidden[:, :1]),
        own.k_lin(hidden),
        own.v_lin(hidden),
        attention_mask,
        own.attention_head_size,
        own.dropout.p if own.training else 0.0,
    )
    first = layer.sa_layer_norm(own.out_lin(read) + hidden[:, :1])
    return layer.output_layer_norm(layer.ffn(first) + first)  # type: ignore[no-any-return]


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    head: int,
    dropout: float,
) -> torch.Tensor:
    """Return what the first token reads of all, (batch, 1, d), before the output projection.

    Args:
        query: (batch, 1, d).
        key: (batch, tokens, d).
        value: (batch, tokens, d).
        mask: (batch or 1, heads or 1, tokens or 1, tokens) as transformers makes it; None: every
            token is seen.
        head: size of a head.
        dropout: probability of a zero in the attention.
    """
    q, k, v = (x.view(*x.shape[:2], -1, head).transpose(1, 2) for x in (query, key, value))
    own = None if mask is None else mask[:, :, :1]
    read = functional.scaled_dot_product_attention(q, k, v, attn_mask=own, dropout_p=dropout)
    return read.transpose(1, 2).reshape(query.shape)


_FORWARD_OF: dict[str, _Forward] = {
    "ViTLayer": _vit,
    "DeiTLayer": _vit,
    "BertLayer": _bert,
    "RobertaLayer": _bert,
    "XLMRobertaLayer": _bert,
    "CamembertLayer": _bert,
    "ElectraLayer": _bert,
    "TransformerBlock": _distilbert,
}
