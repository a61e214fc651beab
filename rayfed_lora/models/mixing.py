"""Whether what a model says of an example depends on what it is computed with.

Clients are trained together on the ground that a frozen layer sees their rows as one batch and
gives each the same as alone. That holds for attention with a mask; it does not for what mixes
examples or padding in (batch statistics, a Fourier transform over the tokens, attention between
examples, experts of a limited capacity). Source: this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rayfed_lora.models.linear import is_linear

Inputs = Mapping[str, torch.Tensor]
# What a layer sees in each of its calls, by its name.
_Seen = dict[str, list[torch.Tensor]]
# Largest difference that is rounding, as a share of the largest value. In float32 sums of another
# order differ by some 1e-6 of it, behind two dozen layers by some 1e-5; padding that is mixed in
# changes it by 1e-2 and more.
_ROUNDING = 1e-4
_SUMS = 4


_FIRST = "the model does not keep a batch's examples in the first dimension"
_ORDER = "the model does not keep a batch's examples in the order of the batch"
_EXAMPLES = "the model mixes the examples of a batch: alone, one has other logits"
_PADDING = "the model mixes padding into its result: without it, a text has other logits"


@dataclass(frozen=True)
class Trial:
    """Examples to try a model on.

    Attributes:
        together: the examples, padded as in training.
        alone: each of them, as long as it is itself.
    """

    together: Inputs
    alone: Sequence[Inputs]


@dataclass(frozen=True)
class Verdict:
    """Why examples cannot be computed together, as far as they cannot.

    Attributes:
        testing: the reason in evaluation mode; None: each gets what it gets alone.
        training: the reason in training mode.
        layers: the reason by linear layer in which each client has factors or weights of its own:
            there the rows of an example must stand one after the other, in the order of examples.
        heads: the same for layers that make the logits: what these read must not depend on padding
            either, since their weights may be zero at first.
    """

    testing: str | None = None
    training: str | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)


def tried(net: nn.Module, trial: Trial) -> Verdict:
    """Return whether a model computes examples together as it does alone.

    Weights, buffers and mode stay as they are. A model that draws in training (dropout) is tried in
    evaluation mode only.

    Args:
        net: a plain model in float32.
        trial: the examples.

    Raises:
        Exception: whatever the model raises on one padded example in evaluation mode.
    """
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    mode = net.training
    try:
        with torch.no_grad():
            net.eval()
            found = _compared(net, trial)
            if found.testing is not None or drops(net):
                return found
            net.train()
            try:
                return replace(_compared(net, trial), testing=None)
            except Exception as error:  # a model may raise anything; a client alone is told of it
                return Verdict(training=_failed(error))
    finally:
        net.train(mode)
        for buffer, before in buffers:
            buffer.copy_(before)


def drops(net: nn.Module) -> bool:
    """Return whether a module draws in training, by its own rate or its model's configuration."""
    config = getattr(net, "config", None)
    modules = (m.p for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    return any(rate > 0 for rate in modules) or (config is not None and _rated(config.to_dict()))


# What a configuration says of classes, whose names are the data's.
_OF_CLASSES = ("id2label", "label2id")


def _rated(value: Any, *, named: bool = False) -> bool:
    """Return whether a rate of dropout is above 0 in a configuration, or in a part of it.

    Args:
        value: of the configuration: a dictionary, a list or a single value.
        named: whether it is under a name of dropout.
    """
    if isinstance(value, Mapping):
        return any(
            _rated(part, named=named or "drop" in str(key))
            for key, part in value.items()
            if key not in _OF_CLASSES
        )
    if isinstance(value, (list, tuple)):
        return any(_rated(part, named=named) for part in value)
    return named and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _compared(net: nn.Module, trial: Trial) -> Verdict:
    """Return the verdict in the net's present mode."""
    padded = [
        {name: values[i : i + 1] for name, values in trial.together.items()}
        for i in range(len(trial.alone))
    ]
    singles = [_pass(net, inputs) for inputs in padded]
    try:
        logits, seen = _pass(net, trial.together)
    except Exception as error:  # a model may raise anything; a client alone is told of it
        return Verdict(_failed(error), _failed(error))
    examples = len(trial.alone)
    layers = {n: _FIRST for n, calls in seen.items() if any(len(x) % examples for x in calls)}
    heads: dict[str, str] = {}
    for i, (said, found) in enumerate(singles):
        if not _alike(logits[i : i + 1], said):
            return Verdict(_EXAMPLES, _EXAMPLES)
        mine = {name: [x.tensor_split(examples)[i] for x in xs] for name, xs in seen.items()}
        for name in seen.keys() | found.keys():
            if not _same_calls(mine.get(name, ()), found.get(name, ())):
                layers.setdefault(name, _ORDER)
    for inputs, own, (said, found) in zip(padded, trial.alone, singles, strict=True):
        if all(inputs[name].shape == values.shape for name, values in own.items()):
            continue
        try:
            short, parts = _pass(net, own)
        except Exception:  # too short for the model: it is computed with padding only
            continue
        if not _alike(_cut(said, short), short):
            return Verdict(_PADDING, _PADDING)
        for name, calls in found.items():
            pairs = zip(calls, parts.get(name, ()), strict=False)
            if not all(_alike(_cut(whole, part), part) for whole, part in pairs):
                heads[name] = _PADDING
    return Verdict(layers=layers, heads=heads)


def _failed(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"a few examples cannot be computed together ({type(error).__name__}: {said})"


def _pass(net: nn.Module, inputs: Inputs) -> tuple[torch.Tensor, _Seen]:
    """Return the logits and what the linear layers see, call by call."""
    seen: _Seen = {}

    def look(
        name: str, _: nn.Module, given: tuple[torch.Tensor, ...], named: Mapping[str, torch.Tensor]
    ) -> None:
        seen.setdefault(name, []).append(_digest(next(iter((*given, *named.values())))))

    hooks = [
        module.register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for name, module in net.named_modules()
        if is_linear(module)
    ]
    try:
        logits: torch.Tensor = net(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits, seen


def _digest(x: torch.Tensor) -> torch.Tensor:
    """Return a few random sums over the last dimension: what is seen is as large as a batch's."""
    generator = torch.Generator().manual_seed(x.shape[-1])
    return x @ torch.randn(x.shape[-1], _SUMS, generator=generator, dtype=x.dtype)


def _cut(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return the part of a padded example that is the example: (1, tokens, d) has more tokens."""
    return whole[:, : part.shape[1]] if whole.dim() == part.dim() == 3 else whole


def _same_calls(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(_alike, one, other))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _ROUNDING * other.abs().max())
