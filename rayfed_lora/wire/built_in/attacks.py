"""Attacks by malicious clients.

Source: Blanchard et al. 2017, "Machine Learning with Adversaries",
NeurIPS (noise); Damaskinos et al. and Fang et al., arXiv:1911.11815 (sign flip); Bagdasaryan et
al., arXiv:1807.00459 (scaling); Tolpegin et al., arXiv:2007.08432 (label flip).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from rayfed_lora.types import FloatArray
from rayfed_lora.wire.update import update

Tensors = dict[str, FloatArray]
_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@update("sign-flip", source="1911.11815")
def sign_flip(tensors: Tensors, rng: np.random.Generator, *, factor: _Positive = 1.0) -> Tensors:
    """The opposite of the update, times `factor`."""
    del rng
    return {name: np.float32(-factor) * x for name, x in tensors.items()}


@update("scaling", source="1807.00459")
def scaling(tensors: Tensors, rng: np.random.Generator, *, factor: _Positive = 10.0) -> Tensors:
    """The update times `factor`."""
    del rng
    return {name: np.float32(factor) * x for name, x in tensors.items()}


@update("noise", source="NeurIPS 2017")
def noise(tensors: Tensors, rng: np.random.Generator, *, std: _Positive = 1.0) -> Tensors:
    """Normal noise of standard deviation `std` in place of the update."""
    deviation = np.float32(std)
    return {n: deviation * rng.standard_normal(x.shape, np.float32) for n, x in tensors.items()}


@update("label-flip", source="2007.08432", acts_on="labels")
def label_flip(labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """Class i of a client's training examples becomes class classes - 1 - i."""
    return classes - 1 - labels
