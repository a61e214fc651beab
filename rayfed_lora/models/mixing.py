"""Whether a model's result for an example depends on the rest of its batch, or on padding.

Clients trained in one batch must have the results of each alone. Models that mix examples or
padding do not give them: batch statistics, a Fourier transform over the tokens, attention between
examples, experts of limited capacity. Source: this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rayfed_lora.models.language import model_inputs
from rayfed_lora.models.linear import is_linear, nearly_equal
from rayfed_lora.models.shapes import FIRST_DIMENSION

Inputs = Mapping[str, torch.Tensor]
# Digests of the inputs of linear layers, call by call, by layer name.
_Calls = dict[str, list[torch.Tensor]]
# Random sums that an input is reduced to.
_SUMS = 4
# Entries of a configuration whose keys or values are names of classes.
_CLASS_ENTRIES = ("id2label", "label2id")

_ORDER = "the model does not keep a batch's examples in the order of the batch"
_EXAMPLES = "the model mixes the examples of a batch: alone, an example has other logits"
_PADDING = "the model mixes padding into its result: without it, a text has other logits"


@dataclass(frozen=True)
class Verdict:
    """Reasons why examples cannot be computed in one batch, where there are any.

    Attributes:
        testing: the reason in evaluation mode; None: each example has the result it has alone.
        training: the reason in training mode.
        layers: reasons by linear layer. They count for layers in which each client has factors or
            weights of its own: their rows must stand in the order of the examples.
        heads: reasons by linear layer that count for layers whose outputs are the logits. Their
            input must not depend on padding, which the logits do not show while weights are zero.
    """

    testing: str | None = None
    training: str | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)


def verdict_on(net: nn.Module, together: Inputs, alone: Sequence[Inputs]) -> Verdict:
    """Return whether a plain model in float32 computes examples in one batch as it does alone.

    Weights, buffers and mode are restored. A model with dropout is tested in evaluation mode only.
    `together` are the examples as one batch, padded as in training; `alone` has each of them as a
    batch of its own, without padding.

    Raises:
        Exception: whatever the model raises on one padded example in evaluation mode.
    """
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    mode = net.training
    try:
        with torch.no_grad():
            net.eval()
            verdict = _compare(net, together, alone)
            if verdict.testing is not None or drops(net):
                return verdict
            net.train()
            try:
                return replace(_compare(net, together, alone), testing=None)
            except Exception as error:  # of any type; training of a single client reports it
                return Verdict(training=_failure(error))
    finally:
        net.train(mode)
        for buffer, before in buffers:
            buffer.copy_(before)


def drops(net: nn.Module) -> bool:
    """Return whether a module, or the model's configuration, has a dropout rate above zero."""
    config = getattr(net, "config", None)
    rates = (m.p for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    named = config is not None and _has_dropout(config.to_dict())
    return named or any(rate > 0 for rate in rates)


def _has_dropout(value: Any, *, named: bool = False) -> bool:
    """Return whether a part of a configuration, below a key with "drop" if `named`, has a rate."""
    if isinstance(value, Mapping):
        parts = ((str(key), part) for key, part in value.items() if key not in _CLASS_ENTRIES)
        return any(_has_dropout(part, named=named or "drop" in key) for key, part in parts)
    if isinstance(value, (list, tuple)):
        return any(_has_dropout(part, named=named) for part in value)
    return named and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _compare(net: nn.Module, together: Inputs, alone: Sequence[Inputs]) -> Verdict:
    """Return the verdict on the model in its present mode."""
    examples = len(alone)
    padded = [{n: x[i : i + 1] for n, x in together.items()} for i in range(examples)]
    singles = [_forward(net, inputs) for inputs in padded]
    if all(bool(torch.isnan(logits).all()) for logits, _ in singles):
        raise ValueError("expected numbers as logits, all are NaN")
    try:
        logits, calls = _forward(net, together)
    except Exception as error:  # of any type; training of a single client reports it
        return Verdict(_failure(error), _failure(error))
    layers = {n: FIRST_DIMENSION for n, xs in calls.items() if any(len(x) % examples for x in xs)}
    heads: dict[str, str] = {}
    for i, (own_logits, own_calls) in enumerate(singles):
        if not nearly_equal(logits[i : i + 1], own_logits):
            return Verdict(_EXAMPLES, _EXAMPLES)
        parts = {name: [x.tensor_split(examples)[i] for x in xs] for name, xs in calls.items()}
        for name in parts.keys() | own_calls.keys():
            found, expected = parts.get(name, []), own_calls.get(name, [])
            if len(found) != len(expected) or not all(map(nearly_equal, found, expected)):
                layers.setdefault(name, _ORDER)
    for inputs, short, (own_logits, own_calls) in zip(padded, alone, singles, strict=True):
        if all(inputs[name].shape == values.shape for name, values in short.items()):
            continue
        try:
            short_logits, short_calls = _forward(net, short)
        except Exception:  # too short for the model, which always computes it with padding
            continue
        if not _equal_without_padding(own_logits, short_logits):
            return Verdict(_PADDING, _PADDING)
        for name, xs in own_calls.items():
            pairs = zip(xs, short_calls.get(name, ()), strict=False)
            if not all(_equal_without_padding(x, part) for x, part in pairs):
                heads[name] = _PADDING
    return Verdict(layers=layers, heads=heads)


def _failure(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"a few examples cannot be computed together ({type(error).__name__}: {reason})"


def _forward(net: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, _Calls]:
    """Return the logits, and digests of the inputs of linear layers."""
    calls: _Calls = {}

    def record(
        name: str, _: nn.Module, args: tuple[torch.Tensor, ...], named: Mapping[str, torch.Tensor]
    ) -> None:
        calls.setdefault(name, []).append(_digest(next(iter((*args, *named.values())))))

    with ExitStack() as stack:
        for name, module in net.named_modules():
            if is_linear(module):
                hook = partial(record, name)
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        return net(**model_inputs(inputs)).logits, calls


def _digest(x: torch.Tensor) -> torch.Tensor:
    """Return a few random sums over the last dimension, since inputs themselves are large."""
    generator = torch.Generator().manual_seed(x.shape[-1])
    return x @ torch.randn(x.shape[-1], _SUMS, generator=generator, dtype=x.dtype)


def _equal_without_padding(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Compare a padded example, (1, tokens, d) or (1, d), with the example alone."""
    cut = whole[:, : part.shape[1]] if whole.dim() == part.dim() == 3 else whole
    return nearly_equal(cut, part)
