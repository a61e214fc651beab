"""What every rule shares: its signature, its result, the server's step, and the error it makes.

Source: server step: Reddi et al., arXiv:2003.00295, Algorithm 1 (here sgd); error: this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayfed_lora.lora.products import norm
from rayfed_lora.types import AdapterState, FloatArray

Float64Array = npt.NDArray[np.float64]
Product = tuple[Float64Array, Float64Array]
WeightedState = tuple[float, AdapterState]


@dataclass(frozen=True)
class Aggregate:
    """The next global state, and how far the rule is from the exact mean.

    Attributes:
        state: same modules, scales and tensor names as the state the clients started from.
        error: ||D_used - D_exact||_F / ||D_exact||_F over all modules, None without factors.
    """

    state: AdapterState
    error: float | None


Rule = Callable[[AdapterState, Iterable[WeightedState], float], Aggregate]


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
    apart = [
        norm(
            np.concatenate([used[m][0], -exact[m][0]], axis=1),
            np.concatenate([used[m][1], exact[m][1]]),
        )
        for m in exact
    ]
    size = float(np.linalg.norm([norm(b, a) for b, a in exact.values()]))
    distance = float(np.linalg.norm(apart))
    if size == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / size
