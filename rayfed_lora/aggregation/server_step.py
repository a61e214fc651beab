"""The server's optimiser on the averaged update.

Source: sgd, adam, yogi: Reddi et al., "Adaptive Federated Optimization", arXiv:2003.00295,
Algorithms 1 and 2; momentum: Hsu et al., arXiv:1909.06335 (FedAvgM).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from rayfed_lora.aggregation.means import Float64Array
from rayfed_lora.types import FloatArray, Frozen

# By tensor: its mean update and, for adam and yogi, the mean of its square.
Moments = Mapping[str, tuple[Float64Array, ...]]


class Optimizer(Protocol):
    """The settings of a server optimiser; the recipe's `aggregation.server_optimizer`."""

    @property
    def name(self) -> str:
        """`sgd`, `momentum`, `adam` or `yogi`."""

    @property
    def lr(self) -> float:
        """Server learning rate, > 0."""

    @property
    def momentum(self) -> float:
        """Share of the earlier updates that is kept (momentum)."""

    @property
    def beta1(self) -> float:
        """Decay of the mean update (adam, yogi)."""

    @property
    def beta2(self) -> float:
        """Decay of the mean squared update (adam, yogi)."""

    @property
    def tau(self) -> float:
        """Added to the root of the mean square (adam, yogi)."""


class OptimizerStep:
    """One round's step: x + lr * f(mean - x), where f remembers earlier rounds.

    sgd: f(d) = d | momentum: m = momentum * m + d, f = m | adam, yogi:
    m = beta1 * m + (1 - beta1) * d, v as each has it, f = m / (sqrt(v) + tau). As in the paper
    there is no bias correction, and v starts at tau^2.

    Attributes:
        lr: server learning rate, 1 for plain averaging.
        linear: whether the step is lr * (mean - x), as for sgd.
        frozen: the factor that no client trains in this round, if any.
        moments: after the step, those that the next one continues from.
    """

    def __init__(
        self, settings: Optimizer, moments: Moments | None = None, frozen: Frozen | None = None
    ) -> None:
        """Continue from the moments of the step before; a tensor of another shape starts anew."""
        self.lr = settings.lr
        self.linear = settings.name == "sgd"
        self.frozen = frozen
        self.moments: dict[str, tuple[Float64Array, ...]] = dict(moments or {})
        self._settings = settings

    def __call__(
        self, start: Mapping[str, FloatArray], means: Mapping[str, Float64Array]
    ) -> dict[str, FloatArray]:
        """Return the stepped tensors, by name, in the order of `start`; float32."""
        return {name: self._stepped(name, x, means[name]) for name, x in start.items()}

    def _stepped(self, name: str, x: FloatArray, mean: Float64Array) -> FloatArray:
        if self._settings.name == "sgd" and self.lr == 1.0:
            return mean.astype(np.float32)
        moved = x + self.lr * self._direction(name, mean - x.astype(np.float64))
        return moved.astype(np.float32)

    def _direction(self, name: str, delta: Float64Array) -> Float64Array:
        settings = self._settings
        if settings.name == "sgd":
            return delta
        m, *rest = self._before(name, delta.shape)
        if settings.name == "momentum":
            m = settings.momentum * m + delta
            self.moments[name] = (m,)
            return m
        m = settings.beta1 * m + (1.0 - settings.beta1) * delta
        (v,) = rest
        square = delta**2
        if settings.name == "adam":
            v = settings.beta2 * v + (1.0 - settings.beta2) * square
        else:
            v = v - (1.0 - settings.beta2) * square * np.sign(v - square)
        self.moments[name] = (m, v)
        direction: Float64Array = m / (np.sqrt(v) + settings.tau)
        return direction

    def _before(self, name: str, shape: tuple[int, ...]) -> tuple[Float64Array, ...]:
        held = self.moments.get(name)
        if held is not None and held[0].shape == shape:
            return held
        zeros = np.zeros(shape)
        if self._settings.name == "momentum":
            return (zeros,)
        return zeros, np.full(shape, self._settings.tau**2)
