"""Dropout whose draws depend on the client alone, not on the clients computed with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Fill = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


class ClientDropout(TorchFunctionMode):
    """While active, each client of a group draws dropout masks from a stream of its own.

    Replaces `torch.nn.functional.dropout` (which `nn.Dropout` calls), the dropout in
    `scaled_dot_product_attention`, and `torch.rand` by example (stochastic depth). A client draws
    for its own examples, not for padding rows; texts are as long as the longest of the group, so
    that draws are those of the client alone where the lengths are the same. Other draws come from
    torch's own state.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        """Start a stream on the device from each client's seed."""
        super().__init__()
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._examples: list[int] = []

    def step(self, examples: Sequence[int]) -> None:
        """Set how many of each client's rows are its own in the next pass; clients may be fewer."""
        self._examples = list(examples)

    def contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """Return what to enter around a layer and, later on, around its second computation.

        The draws of the second one are those of the first one, and go on as if it had not been.
        """
        return nullcontext(), self._again(self._states(), self._examples)

    def _states(self) -> list[torch.Tensor]:
        return [stream.get_state() for stream in self._streams]

    @contextmanager
    def _again(self, states: list[torch.Tensor], examples: list[int]) -> Iterator[None]:
        before = self._states(), self._examples
        self._set(states, examples)
        try:
            # A backward pass on a GPU runs in a thread of its own.
            with self:
                yield
        finally:
            self._set(*before)

    def _set(self, states: list[torch.Tensor], examples: list[int]) -> None:
        for stream, state in zip(self._streams, states, strict=True):
            stream.set_state(state)
        self._examples = examples

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draw for dropout; leave all else as it is."""
        named = dict(kwargs or {})
        if func is functional.dropout:
            return self._dropped(*args, **named)
        if func is functional.scaled_dot_product_attention and named.get("dropout_p", 0.0) > 0:
            return self._attention(*args, **named)
        if func is torch.rand and len(args) == 1 and isinstance(args[0], (tuple, torch.Size)):
            rows = len(self._examples) * max(self._examples)
            if args[0] and args[0][0] == rows:
                zeros = torch.zeros(args[0], **named)
                return self._filled(zeros, lambda x, g: x.uniform_(generator=g))
        return func(*args, **named)

    def _filled(self, zeros: torch.Tensor, fill: _Fill) -> torch.Tensor:
        """Fill the rows of each client's own examples from its stream; all rows of one client."""
        clients = len(self._examples)
        if clients == 1:
            # Not every tensor has a row per example: some models put positions first.
            return fill(zeros, self._streams[0])
        if zeros.shape[0] % (clients * max(self._examples)) != 0:
            raise ValueError(
                f"dropout of {zeros.shape[0]} rows cannot be dealt to {clients} clients of"
                f" {max(self._examples)} examples"
            )
        by_client = zeros.view(clients, zeros.shape[0] // clients, *zeros.shape[1:])
        for rows, examples, stream in zip(by_client, self._examples, self._streams, strict=False):
            each = rows.shape[0] // max(self._examples)
            fill(rows[: examples * each], stream)
        return zeros

    def _dropped(
        self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0.0:
            return x
        zeros = x.new_zeros(x.shape)
        mask = self._filled(zeros, lambda rows, g: rows.bernoulli_(1.0 - p, generator=g))
        return x * mask.mul_(1.0 / (1.0 - p)) if p < 1.0 else x * mask

    def _attention(  # noqa: PLR0913, PLR0917 - torch's own signature
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Return attention as torch documents it, with dropout by client."""
        if enable_gqa:
            heads = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(heads, dim=-3) for x in (key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.transpose(-2, -1) * factor
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._dropped(torch.softmax(scores, dim=-1), dropout_p) @ value
