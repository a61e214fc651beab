"""The result of a rule, the server's step, and the distance from the exact mean.

Source: this project; the server's step: `server_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rayfed_lora.lora.products import WeightedProduct, norm
from rayfed_lora.types import AdapterState, Factors, FloatArray, Frozen

Float64Array = npt.NDArray[np.float64]
# (b, a), (d_out, R) and (R, d_in), scales in b.
Product = tuple[Float64Array, Float64Array]


@dataclass(frozen=True)
class Aggregate:
    """The next global state, and how far the rule is from the exact mean.

    Attributes:
        state: same modules, scales and tensor names as the state the clients started from; no
            factors where the rule lets LoRA start anew.
        merged: update by module that goes into the frozen base; empty for most rules.
        measure: computes ||D_used - D_exact||_F / ||D_exact||_F over all modules. D_exact is the
            same step towards the exact mean; None without factors, and where the step is not
            linear.
    """

    state: AdapterState
    merged: Mapping[str, Product]
    measure: Callable[[], float | None]


class ServerStep(Protocol):
    """The server's step from the state that the clients started from towards their mean.

    Attributes:
        lr: server learning rate, 1 for plain averaging.
        linear: whether the step is lr * (mean - start), as for sgd.
        frozen: the factor that no client trained in this round, if any.
    """

    lr: float
    linear: bool
    frozen: Frozen | None

    def __call__(
        self, start: Mapping[str, FloatArray], means: Mapping[str, Float64Array]
    ) -> dict[str, FloatArray]:
        """Return the stepped tensors, by name, in the order of `start`; float32."""
        ...


def product(factors: Factors) -> Product:
    """Return the effective update of some factors."""
    return WeightedProduct.of(1.0, factors).weighted()


def stepped_product(start: Factors, mean: Product, lr: float) -> Product:
    """Return D_start + lr * (D_mean - D_start), exactly."""
    if lr == 1.0:
        return mean
    old_b, old_a = WeightedProduct.of(1.0 - lr, start).weighted()
    return np.concatenate([old_b, lr * mean[0]], axis=1), np.concatenate([old_a, mean[1]])


def error_of(state: AdapterState, exact: Mapping[str, Product]) -> float | None:
    """Return `relative_error` of a state's effective updates."""
    return relative_error({name: product(f) for name, f in state.factors.items()}, exact)


def relative_error(used: Mapping[str, Product], exact: Mapping[str, Product]) -> float | None:
    """Return ||D_used - D_exact||_F / ||D_exact||_F over all modules.

    Args:
        used: by module.
        exact: likewise.

    Returns:
        The ratio; 0 where both vanish, inf where only the exact one does, None without modules.
    """
    if not exact:
        return None
    apart = [_distance(used[m], exact[m]) for m in exact]
    size = float(np.linalg.norm([norm(b, a) for b, a in exact.values()]))
    distance = float(np.linalg.norm(apart))
    if size == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / size


def difference(one: Product, other: Product) -> Product:
    """Return one product minus another, as a product."""
    (b, a), (other_b, other_a) = one, other
    return np.concatenate([b, -other_b], axis=1), np.concatenate([a, other_a])


def _distance(one: Product, other: Product) -> float:
    """Return the Frobenius norm of the difference of two products."""
    (b, a), (other_b, other_a) = one, other
    if b.shape[1] + other_b.shape[1] < min(b.shape[0], a.shape[1]):
        return norm(*difference(one, other))
    return float(np.linalg.norm(b @ a - other_b @ other_a))
