"""Whether what a model says of an example depends on what it is computed with.

Clients are trained together on the ground that a frozen layer sees their rows as one batch and
gives each the same as alone. That holds for attention with a mask; it does not for what mixes
examples or padding in (batch statistics, a Fourier transform over the tokens, attention between
examples, experts of a limited capacity). Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

Inputs = Mapping[str, torch.Tensor]
# Largest difference that is rounding, as a share of the largest value. In float32 sums of another
# order differ by some 1e-6 of it, behind two dozen layers by some 1e-5; padding that is mixed in
# changes it by 1e-2 and more.
_ROUNDING = 1e-4
_SUMS = 4


def mixing_obstacle(
    net: nn.Module, layers: Sequence[str], together: Inputs, alone: Sequence[Inputs]
) -> str | None:
    """Return why examples cannot be computed together; None where each gets what it gets alone.

    Compares logits, and what the given layers see: there the rows of an example must stand one
    after the other, in the order of the examples. Weights, buffers and mode stay as they are.

    Args:
        net: a plain model in float32. It is tried in training mode, in which clients are trained
            together; where that draws (dropout), in evaluation mode.
        layers: names of the linear layers that serve each client apart.
        together: the examples, padded as in training.
        alone: each of them, as long as it is itself.
    """
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    mode = net.training
    net.train(not _drops(net))
    try:
        with torch.no_grad():
            return _compared(net, layers, together, alone)
    except (
        Exception
    ) as error:  # whatever it is: a client alone is then told of it, if it concerns it
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


def _compared(
    net: nn.Module, layers: Sequence[str], together: Inputs, alone: Sequence[Inputs]
) -> str | None:
    logits, seen = _pass(net, layers, together)
    examples = len(alone)
    if any(x.shape[0] % examples != 0 for x in seen):
        return "the model does not keep a batch's examples in the first dimension"
    for i, own in enumerate(alone):
        mine = [x[i * (len(x) // examples) : (i + 1) * (len(x) // examples)] for x in seen]
        padded = {name: values[i : i + 1] for name, values in together.items()}
        said, found = _pass(net, layers, padded)
        if not _alike(logits[i : i + 1], said):
            return "the model mixes the examples of a batch: alone, one has other logits"
        if len(found) != len(mine) or not all(map(_alike, mine, found)):
            return "the model does not keep a batch's examples in the order of the batch"
        if not _is_padded(padded, own):
            continue
        said, found = _pass(net, layers, own)
        pairs = [(_cut(whole, part), part) for whole, part in zip(mine, found, strict=False)]
        pairs.append((_cut(logits[i : i + 1], said), said))
        if not all(_alike(whole, part) for whole, part in pairs if whole is not None):
            return "the model mixes padding into its result: without it, a text has other logits"
    return None


def _pass(
    net: nn.Module, layers: Sequence[str], inputs: Inputs
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits and what the layers see, call by call."""
    seen: list[torch.Tensor] = []
    with _looking(net, layers, seen):
        logits: torch.Tensor = net(**inputs).logits
    return logits, seen


@contextmanager
def _looking(net: nn.Module, layers: Sequence[str], seen: list[torch.Tensor]) -> Iterator[None]:
    def look(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(_digest(given[0]))

    hooks = [net.get_submodule(name).register_forward_pre_hook(look) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _digest(x: torch.Tensor) -> torch.Tensor:
    """Return a few random sums over the last dimension: what is seen is as large as a batch's."""
    generator = torch.Generator().manual_seed(x.shape[-1])
    return x @ torch.randn(x.shape[-1], _SUMS, generator=generator, dtype=x.dtype)


def _is_padded(padded: Inputs, own: Inputs) -> bool:
    return any(padded[name].shape != values.shape for name, values in own.items())


def _cut(whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor | None:
    """Return what of a padded example stands for the example itself, None where that is unclear.

    What has a row for each token is (1, tokens, d).
    """
    if whole.shape == part.shape:
        return whole
    by_token = whole.dim() == part.dim() == 3 and whole.shape[0] == part.shape[0]
    longer = by_token and whole.shape[1] >= part.shape[1] and whole.shape[2] == part.shape[2]
    return whole[:, : part.shape[1]] if longer else None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _ROUNDING * other.abs().max())
