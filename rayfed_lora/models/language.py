"""The loss of a causal language model, without all logits in memory at once.

The logits of a few tokens, (tokens, vocabulary), are computed from the last hidden states, and with
them at once the gradient of their losses: no logits stay until the backward pass.

Source: this project; the gradient in the forward pass as in Liger Kernel, arXiv:2410.10989,
section 3.2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from rayfed_lora.data.examples import COUNTED, POSITIONS
from rayfed_lora.recipe.memory import LOGIT_BYTES, TESTED_LOGIT_BYTES

_log = logging.getLogger(__name__)
Inputs = Mapping[str, torch.Tensor]
# (1, n, hidden) -> (1, n, vocabulary).
_Logits = Callable[[torch.Tensor], torch.Tensor]
# Largest difference of two computations of the same logits, relative to the largest logit.
_ROUNDING = 1e-4
# Tokens of a text that are computed to find out how logits are made.
_PROBED = 8


class TokenLosses(NamedTuple):
    """Results by text, over its tokens that count.

    Attributes:
        losses: (texts,) sum of cross entropies, nats.
        tokens: (texts,) number of tokens.
        right: (texts,) number of tokens to which the model gives the highest logit; None where
            that was not asked for.
    """

    losses: torch.Tensor
    tokens: torch.Tensor
    right: torch.Tensor | None


def model_inputs(inputs: Inputs) -> dict[str, Any]:
    """Return the inputs that a model is given, of those of `targets_of`, or of any other model.

    With positions, a row may have several texts: transformers lets each see itself only where it
    gets neither a mask nor a cache of keys and values. Padding is a text of its own.
    """
    own: dict[str, Any] = {name: values for name, values in inputs.items() if name != COUNTED}
    if POSITIONS in own:
        own.pop("attention_mask", None)
        own["use_cache"] = False
    return own


def targets_of(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens to be predicted, and which of them count, both (texts, length - 1).

    Args:
        inputs: `input_ids` and `attention_mask`, (texts, length), and perhaps `COUNTED`, above 0 on
            the tokens that count; default: all but padding.
    """
    counted = inputs["attention_mask"][:, 1:] > 0
    if COUNTED in inputs:
        counted = counted & (inputs[COUNTED][:, 1:] > 0)
    return inputs["input_ids"][:, 1:], counted


def token_losses(logits: torch.Tensor, inputs: Inputs, *, scored: bool = True) -> TokenLosses:
    """Return the loss of a causal language model by text, over its tokens from the second on.

    Args:
        logits: (texts, length, vocabulary).
        inputs: as in `targets_of`.
        scored: whether to count the right tokens too.

    Source: as transformers' causal models compute it.
    """
    targets, counted = targets_of(inputs)
    predictions = logits[:, :-1]
    losses = functional.cross_entropy(predictions.transpose(1, 2), targets, reduction="none")
    right = ((predictions.argmax(dim=2) == targets) & counted).sum(dim=1) if scored else None
    return TokenLosses((losses * counted).sum(dim=1), counted.sum(dim=1), right)


class LanguageLoss:
    """Computes losses of a language model; in chunks where its logits would take much memory."""

    def __init__(self, net: nn.Module, probe: Inputs) -> None:
        """Find out how to compute logits from hidden states.

        Args:
            net: transformers' causal language model, on its device.
            probe: a few texts; the logits of their first tokens are computed in both ways. Where
                they differ in all ways that are known, losses are computed from all logits.
        """
        self._net: Any = net
        self._head: nn.Module | None = getattr(net, "get_output_embeddings", lambda: None)()
        self._way: _Stub | _Head | None = None
        if self._head is not None:
            ways = [way for way in (_Stub.of(net), _Head(net, self._head)) if way is not None]
            self._way = next((way for way in ways if _agrees(net, way, probe)), None)
        if self._way is None:
            _log.info("%s: losses are computed from all logits", type(net).__name__)

    @property
    def in_chunks(self) -> bool:
        """Whether logits can be computed a few at a time."""
        return self._way is not None

    def most_texts(self, length: int, device: torch.device) -> int:
        """Return how many texts of so many tokens a test computes at once: at least one."""
        limit = TESTED_LOGIT_BYTES["cpu" if device.type == "cpu" else "cuda"]
        # All logits and their exponentials are there at once, and the activations of one layer.
        limit = limit if self.in_chunks else limit // 4
        return max(1, limit // max(1, 4 * length * self._vocabulary()))

    def __call__(self, inputs: Inputs, *, scored: bool = False) -> TokenLosses:
        """Return the losses of texts; inputs as in `targets_of`."""
        own = model_inputs(inputs)
        texts, length = inputs["input_ids"].shape
        most = LOGIT_BYTES["cpu" if inputs["input_ids"].device.type == "cpu" else "cuda"]
        row_bytes = 4 * self._vocabulary()
        # With few logits one pass over all of them is quicker. Factors in the output layer are
        # those of the clients: it must see their rows together.
        whole = texts * length * row_bytes <= most
        way, head = self._way, self._head
        if way is None or head is None or whole or getattr(head, "factors", None) is not None:
            return token_losses(self._net(**own).logits.float(), inputs, scored=scored)
        targets, counted = targets_of(inputs)
        # No keys and values for generating. Small batches (above) keep the model's default, with
        # which some models (GPT-2) round otherwise.
        config: Any = self._net.config
        own = {**own, **({"use_cache": False} if hasattr(config, "use_cache") else {})}
        hidden = way.hidden(own)[:, :-1]
        # Tokens that do not count, such as prompts and padding, get no logits.
        place = counted.flatten().nonzero().squeeze(1)
        rows = hidden.flatten(0, 1).index_select(0, place)
        chosen = targets.flatten().index_select(0, place)
        size = max(1, most // row_bytes)
        trained = any(p.requires_grad for p in head.parameters())
        each, hits = _chunked(way.logits, rows, chosen, size, scored=scored, trained=trained)
        tokens = counted.sum(dim=1)
        losses = _by_text(each, place, counted).sum(dim=1)
        right = None if hits is None else _by_text(hits, place, counted).sum(dim=1)
        return TokenLosses(losses, tokens, right)

    def _vocabulary(self) -> int:
        weight = getattr(self._head, "weight", None)
        return 0 if weight is None else int(weight.shape[0])


def _chunked(
    logits_of: _Logits,
    rows: torch.Tensor,
    targets: torch.Tensor,
    size: int,
    *,
    scored: bool,
    trained: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (n,) the losses of (n, hidden) tokens and, if `scored`, whether each is predicted.

    `size` tokens are computed at once; `trained`: the output layer gets gradients too.
    """
    if torch.is_grad_enabled() and not scored and not trained:
        return _ChunkedLoss.apply(rows, targets, logits_of, size), None  # type: ignore[no-untyped-call]
    pairs = list(zip(torch.split(rows, size), torch.split(targets, size), strict=True))
    if torch.is_grad_enabled() and not scored:
        parts = [checkpoint(_losses, logits_of, h, y, use_reentrant=False) for h, y in pairs]
        return torch.cat(parts), None
    losses, hits = [], []
    for h, y in pairs:
        logits = logits_of(h[None])[0].float()
        losses.append(functional.cross_entropy(logits, y, reduction="none"))
        hits.append(logits.argmax(dim=1) == y)
    return torch.cat(losses), torch.cat(hits)


def _losses(logits_of: _Logits, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_of(rows[None])[0].float(), targets, reduction="none")


class _ChunkedLoss(torch.autograd.Function):
    """(n,) losses of (n, hidden) rows under a frozen output layer.

    A token's loss depends on its own row alone, so that the gradient of any weighted sum of losses
    is that of each loss times its weight.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, targets: torch.Tensor, logits_of: _Logits, size: int
    ) -> torch.Tensor:
        losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        gradients = torch.empty_like(rows)
        for low in range(0, len(rows), size):
            part = slice(low, low + size)
            with torch.enable_grad():
                own = rows[part].detach().requires_grad_()
                each = _losses(logits_of, own, targets[part])
                (gradients[part],) = torch.autograd.grad(each.sum(), own)
            losses[part] = each.detach()
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * weights.unsqueeze(1).to(gradients.dtype), None, None, None


def _by_text(values: torch.Tensor, place: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Put (n,) values at their places in a tensor of zeros of the shape of `like`."""
    zeros = values.new_zeros(like.numel())
    return zeros.index_copy(0, place, values).view(like.shape)


class _Stub:
    """Logits by the model itself, with given hidden states in place of its decoder.

    So they have all that the model does to its logits (soft caps, factors).
    """

    def __init__(self, net: Any, name: str) -> None:
        self._net, self._name = net, name

    @classmethod
    def of(cls, net: Any) -> _Stub | None:
        name = getattr(net, "base_model_prefix", "")
        return cls(net, name) if isinstance(getattr(net, name or " ", None), nn.Module) else None

    def hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        decoder = getattr(self._net, self._name)
        return decoder(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        modules, decoder = self._net._modules, self._net._modules[self._name]
        try:
            modules[self._name] = _Given(hidden)
            return self._net(input_ids=ids).logits  # type: ignore[no-any-return]
        finally:
            modules[self._name] = decoder


class _Given(nn.Module):
    """Stands for a decoder that has computed its hidden states before."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


class _Head:
    """Logits by the output layer alone, from what the model gives to it."""

    def __init__(self, net: Any, head: nn.Module) -> None:
        self._net, self.logits = net, head

    def hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        with _called(self.logits, found):
            self._net(**inputs)
        return found[0]


@contextmanager
def _called(head: nn.Module, found: list[torch.Tensor]) -> Iterator[None]:
    """Let a layer keep what it is given, and return next to nothing."""

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        found.append(hidden)
        return hidden[..., :1]

    own = head.__dict__.get("forward")
    head.forward = keep
    try:
        yield
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:
            head.forward = own


def _agrees(net: Any, way: _Stub | _Head, probe: Inputs) -> bool:
    """Return whether logits from hidden states are the model's own."""
    mode = net.training
    try:
        net.eval()
        with torch.no_grad():
            own = model_inputs(probe)
            expected = net(**own).logits
            hidden = way.hidden(own)
            found = torch.cat([way.logits(part) for part in torch.split(hidden, 1)])
        close: bool = found.shape == expected.shape and bool(
            (found - expected).abs().max() <= _ROUNDING * expected.abs().max()
        )
        return close
    except Exception as error:  # of any type: another way is tried
        _log.debug("%s: %s", type(way).__name__, error)
        return False
    finally:
        net.train(mode)


def language_loss(net: nn.Module, texts: Inputs) -> LanguageLoss:
    """Return the loss of a model, given a few texts, whose first tokens are computed."""
    return LanguageLoss(net, {name: values[:, :_PROBED] for name, values in texts.items()})
