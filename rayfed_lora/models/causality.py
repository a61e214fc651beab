"""A test that a language model attends to earlier tokens only. Source: this project.

transformers has language-model heads for encoders too (BERT, RoBERTa, XLM), which see the token
that they are to predict in their input: the loss falls to zero, and nothing is learned.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.quiet import quiet
from rayfed_lora.recipe.model import Model

# Names of the switch that makes a model causal (XLM's kind: `causal`).
_SWITCHES = ("is_decoder", "causal")
_TOKENS = 8
_CHANGED = 5
# Sizes of the tested copy; each is applied on top of those before it until the copy is small.
_CUTS: tuple[dict[str, int], ...] = (
    {},
    {"num_hidden_layers": 1},
    {"vocab_size": 1_000},
    {"intermediate_size": 64},
)
_SMALL = 10_000_000
# Parameters of one layer of a model with ten billion.
_MOST_PARAMETERS = 100_000_000
# Largest rounding error, relative to the largest logit; later tokens change more than 1e-3 of it.
_ROUNDING = 1e-5


def check_causal(model: Model, config: Any) -> None:
    """Check that the logits of a position do not depend on later tokens.

    This depends on the architecture alone, so a copy with random weights is tested; of a large
    model, a copy with one layer and a small vocabulary. A model whose copy is still too large, or
    that does not take plain tokens, passes untested.

    Raises:
        ModelError: they do; names the switch to set where the model has one.
    """
    if not _sees_later_tokens(model, config):
        return
    advice = "choose a decoder such as gpt2 or llama"
    for switch in filter(partial(hasattr, config), _SWITCHES):
        decoder = copy.deepcopy(config)
        setattr(decoder, switch, True)
        if _sees_later_tokens(model, decoder) is False:
            advice = (
                f"write model.config: {{{switch}: true}}, with which it attends to no later one"
            )
            break
    raise ModelError(
        f"model.task 'causal-lm': {config.model_type} sees the tokens that it is to predict, since"
        f" it attends to later positions; {advice}"
    )


def _sees_later_tokens(model: Model, config: Any) -> bool | None:
    """Return whether later tokens change earlier logits; None where that cannot be computed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            net = small_copy(model, config)
            return None if net is None else _later_tokens_matter(net)
        except Exception:  # reported by other checks
            return None


def small_copy(model: Model, config: Any) -> nn.Module | None:
    """Return a copy with random weights, reduced where it is large; None if it is still large."""
    smaller = copy.deepcopy(config)
    for cut in _CUTS:
        for name, value in cut.items():
            if hasattr(smaller, name):
                setattr(smaller, name, value)
        size = sum(p.numel() for p in base_models.skeleton(model, smaller).parameters())
        if size <= _SMALL:
            break
    return base_models.randomly_initialised(model, smaller) if size <= _MOST_PARAMETERS else None


def _later_tokens_matter(net: nn.Module) -> bool:
    vocabulary = net.get_input_embeddings().num_embeddings  # type: ignore[operator]
    # Low numbers are often special tokens.
    first, last = min(5, vocabulary - 2), vocabulary - 1
    ids = first + torch.arange(2 * _TOKENS).reshape(2, -1) % (last - first)
    changed = ids.clone()
    changed[:, _CHANGED:] = first + (ids[:, _CHANGED:] - first + 1) % (last - first)
    mask = torch.ones_like(ids)
    net.eval()
    with torch.no_grad(), quiet():
        before, after = (
            net(input_ids=each, attention_mask=mask).logits[:, :_CHANGED] for each in (ids, changed)
        )
    return bool((before - after).abs().max() > _ROUNDING * before.abs().max())
