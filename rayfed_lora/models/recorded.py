"""A forward pass that is recorded once and then run without Python.

A small model's pass spends an eighth of its time in the Python of its modules, and while it does no
other thread of the process gets on. `torch.jit.trace` writes down the operations of a pass; run as
they are, without its optimisations, they give the same bits. torch calls it deprecated and has
nothing in its place that needs no compiler: where it is gone, or gives anything else, passes are
run as ever.

Source: this project (benchmarks/README.md).
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from threading import Lock

import torch
from torch.jit import optimized_execution  # type: ignore[attr-defined]

from rayfed_lora.models.adapted import AdaptedModel

_log = logging.getLogger(__name__)
# Passes of a kind before it may be recorded, and how many more have to be expected: recording takes
# as long as it saves in some thirty of training, in some fifty of testing.
PASSES_BEFORE, PASSES_WORTH = 8, 60
# What is recorded at most, and what is counted at most before it is.
_MOST_RECORDED, _MOST_COUNTED = 32, 1_000
_RECORDING = Lock()

# What decides the operations of a pass: mode, gradients, names and shapes of all it is given.
_Kind = tuple[bool, bool, tuple[tuple[str, torch.Size], ...]]


class RecordedPasses:
    """Computes a model's logits; what is often asked for is recorded."""

    def __init__(self, model: AdaptedModel, *, recording: bool) -> None:
        """Record nothing yet.

        Args:
            model: what is loaded into it may change between passes.
            recording: whether a pass may be: its operations must follow from the names and shapes
                of what it is given alone, and none may draw.
        """
        self._model = model
        self._recording = recording and not model.obstacle and not model.resident.has_statistics
        self._passes: Counter[_Kind] = Counter()
        self._recorded: dict[_Kind, Callable[..., torch.Tensor]] = {}
        # The base is part of what is recorded.
        self._bases = model.resident.changes
        # How long the run still takes, as a multiple of how long it has taken.
        self.left = 0.0

    def logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what the loaded model says of some inputs.

        Args:
            inputs: by argument name, examples in the first dimension.
        """
        net, own = self._model.net, self._model.own_tensors() if self._recording else None
        if own is None:
            return net(**inputs).logits  # type: ignore[no-any-return]
        if self._bases != self._model.resident.changes:
            self._forget()
        given = {**inputs, **own}
        shapes = tuple((name, tensor.shape) for name, tensor in given.items())
        kind = (net.training, torch.is_grad_enabled(), shapes)
        recorded = self._recorded.get(kind)
        if recorded is not None:
            with optimized_execution(False):
                return recorded(*given.values())
        logits: torch.Tensor = net(**inputs).logits
        self._passes[kind] += 1
        if self._pays(self._passes[kind]):
            self._record(kind, inputs, own, logits)
        if len(self._passes) > _MOST_COUNTED:
            self._passes.clear()
        return logits

    def _pays(self, passes: int) -> bool:
        """Return whether to record a kind of pass that has been run so many times."""
        often = passes >= PASSES_BEFORE and passes * self.left >= PASSES_WORTH
        return often and len(self._recorded) < _MOST_RECORDED

    def _forget(self) -> None:
        self._passes.clear()
        self._recorded.clear()
        self._bases = self._model.resident.changes

    def _record(
        self,
        kind: _Kind,
        inputs: Mapping[str, torch.Tensor],
        own: Mapping[str, torch.Tensor],
        logits: torch.Tensor,
    ) -> None:
        """Record a pass, or nothing from now on if what it gives is not what it gave."""
        try:
            recorded = self._traced(inputs, own)
            with torch.no_grad(), optimized_execution(False):
                again = recorded(*inputs.values(), *own.values())
            same = torch.allclose(again, logits, rtol=0.0, atol=0.0, equal_nan=True)
        except Exception as error:  # whatever it is: passes are run as they were
            _log.info("forward passes are not recorded: %s", error)
            same = False
        if same:
            self._recorded[kind] = recorded
        else:
            self._recording = False
            self._forget()

    def _traced(
        self, inputs: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        model = self._model

        def run(*tensors: torch.Tensor) -> torch.Tensor:
            with model.holding(dict(zip(own, tensors[len(inputs) :], strict=True))):
                seen = dict(zip(inputs, tensors, strict=False))
                return model.net(**seen).logits  # type: ignore[no-any-return]

        with _RECORDING, warnings.catch_warnings():
            # Of shapes that become constants (they are part of the kind), and of the deprecation.
            warnings.simplefilter("ignore")
            recorded: Callable[..., torch.Tensor]
            given = (*inputs.values(), *own.values())
            recorded = torch.jit.trace(run, given, check_trace=False)  # type: ignore[no-untyped-call]
        return recorded
