"""Activation checkpointing: layers are computed again in the backward pass, to the same values.

Source: Chen et al. 2016, arXiv:1604.06174; transformers' and torch's implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rayfed_lora.errors import ModelError

# Of one layer: around its first and around its second computation.
_Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


def can_checkpoint(net: nn.Module) -> bool:
    """Return whether transformers can recompute the layers of a model."""
    known = getattr(net, "supports_gradient_checkpointing", False)
    return bool(known) and any(hasattr(m, "gradient_checkpointing") for m in net.modules())


def is_recomputed(module: nn.Module) -> bool:
    """Return whether a module is a layer that is computed again as a whole."""
    return isinstance(module, GradientCheckpointingLayer)


def check_checkpointing(net: nn.Module, wanted: object) -> None:
    """Raise ModelError where `runtime.checkpoint_activations` is true, and it is not possible."""
    if wanted is True and not can_checkpoint(net):
        raise ModelError(
            f"runtime.checkpoint_activations: expected auto or false with {type(net).__name__},"
            " whose layers transformers cannot recompute, got true"
        )


class Checkpointing:
    """Switches activation checkpointing of a model on and off.

    A model that fills its cache of keys and values in training without it may round otherwise.
    torch's own random state is the same in both computations of a layer; `contexts` does that for
    other streams of random numbers.
    """

    def __init__(self, net: nn.Module) -> None:
        """Leave it off."""
        self._net: Any = net
        self._on = False
        self._use_cache = getattr(net.config, "use_cache", None)
        self._contexts: Callable[[], _Contexts] | None = None

    def switch(self, *, on: bool, contexts: Callable[[], _Contexts] | None = None) -> None:
        """Set it for the next passes in training mode.

        Args:
            on: whether layers are computed again.
            contexts: called before each layer, returns what to enter around its two computations.
        """
        self._contexts = contexts
        if on == self._on:
            return
        self._on = on
        if hasattr(self._net.config, "use_cache"):
            # Keys and values that a layer keeps would be kept twice.
            self._net.config.use_cache = False if on else self._use_cache
        # Newer versions of transformers have renamed both.
        if not on:
            name = "activation_checkpointing_disable"
            getattr(self._net, name, self._net.gradient_checkpointing_disable)()
            return
        settings = {"use_reentrant": False, "context_fn": self._around}
        if hasattr(self._net, "activation_checkpointing_enable"):
            self._net.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            self._net.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def _around(self) -> _Contexts:
        return (nullcontext(), nullcontext()) if self._contexts is None else self._contexts()
