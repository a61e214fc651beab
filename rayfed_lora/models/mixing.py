"""Whether what a model says of an example depends on what it is computed with.

Clients are trained together on the ground that a frozen layer sees their rows as one batch and
gives each the same as alone. That holds for attention with a mask; it does not for what mixes
examples or padding in (batch statistics, a Fourier transform over the tokens, attention between
examples, experts of a limited capacity). Source: this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

Inputs = Mapping[str, torch.Tensor]
# Of a layer: its name, and what it sees.
_Call = tuple[str, torch.Tensor]
# Largest difference that is rounding, as a share of the largest value. In float32 sums of another
# order differ by some 1e-6 of it, behind two dozen layers by some 1e-5; padding that is mixed in
# changes it by 1e-2 and more.
_ROUNDING = 1e-4
_SUMS = 4


@dataclass(frozen=True)
class Trial:
    """Examples to try a model on, and the layers to look at.

    Attributes:
        together: the examples, padded as in training.
        alone: each of them, as long as it is itself.
        layers: names of the linear layers that serve each client apart: there the rows of an
            example must stand one after the other, in the order of the examples.
        head: those of them that make the logits: what they see must not depend on padding either,
            since their weights may be zero at first.
    """

    together: Inputs
    alone: Sequence[Inputs]
    layers: Sequence[str] = ()
    head: Sequence[str] = ()


def mixing_obstacle(net: nn.Module, trial: Trial, *, training: bool) -> str | None:
    """Return why examples cannot be computed together; None where each gets what it gets alone.

    Weights, buffers and mode stay as they are.

    Args:
        net: a plain model in float32.
        trial: the examples.
        training: whether to try it in training mode, in which clients are trained together; where
            that draws (dropout), it is evaluation mode all the same.
    """
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    mode = net.training
    net.train(training and not _drops(net))
    try:
        with torch.no_grad():
            return _compared(net, trial)
    except Exception as error:  # a model may raise anything; a client alone is then told of it
        said = str(error).strip().partition("\n")[0]
        return f"a few examples cannot be computed together ({type(error).__name__}: {said})"
    finally:
        net.train(mode)
        for buffer, before in buffers:
            buffer.copy_(before)


def _drops(net: nn.Module) -> bool:
    """Return whether a module draws in training, by its own rate or its model's configuration."""
    config = getattr(net, "config", None)
    values = {} if config is None else config.to_dict()
    rates = [value for key, value in values.items() if "drop" in key]
    rates += [m.p for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _compared(net: nn.Module, trial: Trial) -> str | None:
    logits, seen = _pass(net, trial.layers, trial.together)
    examples = len(trial.alone)
    if any(len(x) % examples != 0 for _, x in seen):
        return "the model does not keep a batch's examples in the first dimension"
    for i, own in enumerate(trial.alone):
        mine = [(name, x.tensor_split(examples)[i]) for name, x in seen]
        padded = {name: values[i : i + 1] for name, values in trial.together.items()}
        said, found = _pass(net, trial.layers, padded)
        if not _alike(logits[i : i + 1], said):
            return "the model mixes the examples of a batch: alone, one has other logits"
        if len(found) != len(mine) or not all(map(_same_call, mine, found)):
            return "the model does not keep a batch's examples in the order of the batch"
        if all(padded[name].shape == values.shape for name, values in own.items()):
            continue
        said, found = _pass(net, trial.layers, own)
        pairs = [(logits[i : i + 1], said)]
        # Called as often, or the logits would differ.
        pairs += [
            (whole, part)
            for (name, whole), (_, part) in zip(mine, found, strict=False)
            if name in trial.head
        ]
        if not all(_alike(_cut(whole, part), part) for whole, part in pairs):
            return "the model mixes padding into its result: without it, a text has other logits"
    return None


def _pass(
    net: nn.Module, layers: Sequence[str], inputs: Inputs
) -> tuple[torch.Tensor, list[_Call]]:
    """Return the logits and what the layers see, call by call."""
    seen: list[_Call] = []

    def look(name: str, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append((name, _digest(given[0])))

    hooks = [net.get_submodule(n).register_forward_pre_hook(partial(look, n)) for n in layers]
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


def _same_call(one: _Call, other: _Call) -> bool:
    return one[0] == other[0] and _alike(one[1], other[1])


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _ROUNDING * other.abs().max())
