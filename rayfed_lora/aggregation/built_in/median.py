"""The median of each value over the clients. Source: arXiv:1803.01498."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.updates import ClientUpdates
from rayfed_lora.types import FloatArray


@rule("median", source="1803.01498", summary="median of each value (Yin et al.)")
def median(start: Mapping[str, FloatArray], updates: ClientUpdates) -> dict[str, FloatArray]:
    """Return the median of each value over the clients: Definition 1 of the paper.

    Clients count the same, whatever their number of examples.
    """
    return {name: np.median(tensor, axis=0) for name, tensor in updates.tensors.items()}
