"""What every rule shares: its signature, its result, the server's step, and the error it makes.

Source: server step: Reddi et al., arXiv:2003.00295, Algorithm 1 (here sgd); error: this project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rayfed_lora.lora.products import norm
from rayfed_lora.types import AdapterState, FloatArray

Float64Array = npt.NDArray[np.float64]
Product = tuple[Float64Array, Float64Array]


@dataclass(frozen=True)
class Aggregate:
    """The next global state, and how far the rule is from the exact mean.

    Attributes:
        state: same modules, scales and tensor names as the state the clients started from.
        error: ||D_used - D_exact||_F / ||D_exact||_F over all modules, None without factors.
    """

    state: AdapterState
    error: float | None


class Reduction(Protocol):
    """What a rule keeps of the updates it has taken in; picklable, and no larger for more of them.

    A block of clients is reduced where it was trained; the reductions are joined in block order.
    """

    def add(self, weight: float, state: AdapterState) -> None:
        """Take one client in.

        Args:
            weight: > 0, in any unit, e.g. examples.
            state: its trained state.
        """
        ...

    def join(self, other: Any) -> None:
        """Take in what another reduction of the same rule has, whose clients come after."""
        ...

    def aggregate(self, start: AdapterState, lr: float) -> Aggregate:
        """Return the next global state.

        Args:
            start: the state the clients started from.
            lr: server learning rate, 1 for plain averaging.
        """
        ...


def stepped(start: FloatArray, mean: Float64Array, lr: float) -> FloatArray:
    """Return start + lr * (mean - start) in float32; the mean itself where lr is 1."""
    target = mean if lr == 1.0 else start + lr * (mean - start.astype(np.float64))
    return target.astype(np.float32)


def stepped_tensors(
    start: Mapping[str, FloatArray], means: Mapping[str, Float64Array], lr: float
) -> dict[str, FloatArray]:
    """Return `stepped` of every tensor, by name, in the order of `start`."""
    return {name: stepped(tensor, means[name], lr) for name, tensor in start.items()}


def relative_error(used: Mapping[str, Product], exact: Mapping[str, Product]) -> float | None:
    """Return ||D_used - D_exact||_F / ||D_exact||_F over all modules.

    Args:
        used: (b, a) by module, (d_out, R) and (R, d_in), scales in b.
        exact: likewise.

    Returns:
        The ratio, 0 where both vanish, inf where only the exact one does, None where there are
        no modules.
    """
    if not exact:
        return None
    apart = [_distance(used[m], exact[m]) for m in exact]
    size = float(np.linalg.norm([norm(b, a) for b, a in exact.values()]))
    distance = float(np.linalg.norm(apart))
    if size == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / size


def _distance(one: Product, other: Product) -> float:
    """Return the Frobenius norm of the difference of two products."""
    (b, a), (other_b, other_a) = one, other
    if b.shape[1] + other_b.shape[1] < min(b.shape[0], a.shape[1]):
        return norm(np.concatenate([b, -other_b], axis=1), np.concatenate([a, other_a]))
    return float(np.linalg.norm(b @ a - other_b @ other_a))
