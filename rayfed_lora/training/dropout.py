"""Dropout whose draws belong to a client, whoever is computed beside it. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ClientDropout(TorchFunctionMode):
    """While active, each client of a group draws its dropout masks from a stream of its own.

    Takes the place of `torch.nn.functional.dropout`, which `nn.Dropout` calls too. A client draws
    for its own examples, not for rows that fill its batch up; texts are as long as the longest
    of the group, so that draws are those of the client alone where the lengths are the same.
    Dropout inside a fused attention kernel is not reached: it draws from torch's own state.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        """Start the streams.

        Args:
            seeds: one a client of the group.
            device: where the model computes.
        """
        super().__init__()
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._examples: list[int] = []

    def step(self, examples: Sequence[int]) -> None:
        """Say how many of each client's rows are its own in the next pass; clients may be fewer."""
        self._examples = list(examples)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draw for dropout; leave all else as it is."""
        if func is functional.dropout:
            return self._dropped(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropped(
        self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0.0:
            return x
        clients = len(self._examples)
        by_client = x.new_zeros((clients, x.shape[0] // clients, *x.shape[1:]))
        for mask, examples, stream in zip(by_client, self._examples, self._streams, strict=False):
            each = mask.shape[0] // max(self._examples)
            mask[: examples * each].bernoulli_(1.0 - p, generator=stream)
        return x * by_client.view(x.shape) / (1.0 - p)
