"""Whether a language model looks back only: computed, not read off its name.

transformers has language-model heads for encoders too (BERT, RoBERTa, XLM). Trained to predict the
next token they see it in their input: the loss falls to nothing, and nothing is learned.

Source: this project.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.recipe.model import Model

# What configurations call it that a model looks back only (XLM's kind: `causal`).
_SWITCHES = ("is_decoder", "causal")
_TOKENS = 8
_CHANGED = 5
# Sizes of the copy that is built for this, each tried with those before it until the copy is small.
_CUTS: tuple[dict[str, int], ...] = (
    {},
    {"num_hidden_layers": 1},
    {"vocab_size": 1_000},
    {"intermediate_size": 64},
)
_SMALL = 10_000_000
# A layer of a model with ten billion parameters.
_MOST_PARAMETERS = 100_000_000
# Of the largest logit; a model that sees the future differs by more than a thousandth of it.
_ROUNDING = 1e-5


def check_causal(model: Model, config: Any) -> None:
    """Check that the logits of a position do not depend on later tokens.

    What a model sees is its architecture's: a copy with random weights shows it, of one layer and a
    small vocabulary where the model is large. A layer too large for that is not looked at, nor is
    a model that does not take plain tokens.

    Args:
        model: the recipe's section, of task causal-lm.
        config: its configuration.

    Raises:
        ModelError: they do; names what to write where the model has a switch for it.
    """
    if not _sees_the_future(model, config):
        return
    works = [name for name in _SWITCHES if _helps(model, config, name)]
    advice = (
        f"write model.config: {{{works[0]}: true}}, with which it looks back only"
        if works
        else "choose a decoder such as gpt2 or llama"
    )
    raise ModelError(
        f"model.task 'causal-lm': {config.model_type} sees the tokens that it is to predict, since"
        f" it attends to later positions; {advice}"
    )


def _helps(model: Model, config: Any, switch: str) -> bool:
    """Return whether the model looks back only once the switch is set."""
    if not hasattr(config, switch):
        return False
    decoder = copy.deepcopy(config)
    setattr(decoder, switch, True)
    return _sees_the_future(model, decoder) is False


def _sees_the_future(model: Model, config: Any) -> bool | None:
    """Return whether later tokens change earlier logits; None where that cannot be computed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            net = _small(model, config)
            return None if net is None else _depends(net)
        except Exception:  # it is not this check that says what else is wrong with a model
            return None


def _small(model: Model, config: Any) -> nn.Module | None:
    """Return the model with random weights, cut down where it is large; None if it stays so."""
    smaller = copy.deepcopy(config)
    for cut in _CUTS:
        for name, value in cut.items():
            if hasattr(smaller, name):
                setattr(smaller, name, value)
        size = _size(model, smaller)
        if size <= _SMALL:
            break
    return sources.drawn(model, smaller) if size <= _MOST_PARAMETERS else None


def _size(model: Model, config: Any) -> int:
    return sum(parameter.numel() for parameter in sources.skeleton(model, config).parameters())


def _depends(net: nn.Module) -> bool:
    vocabulary = net.get_input_embeddings().num_embeddings  # type: ignore[operator]
    # Low numbers are often special tokens.
    first, last = min(5, vocabulary - 2), vocabulary - 1
    ids = first + torch.arange(2 * _TOKENS).reshape(2, -1) % (last - first)
    changed = ids.clone()
    changed[:, _CHANGED:] = first + (ids[:, _CHANGED:] - first + 1) % (last - first)
    mask = torch.ones_like(ids)
    net.eval()
    with torch.no_grad(), sources.quiet():
        before, after = (
            net(input_ids=each, attention_mask=mask).logits[:, :_CHANGED] for each in (ids, changed)
        )
    return bool((before - after).abs().max() > _ROUNDING * before.abs().max())
