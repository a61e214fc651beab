"""The mean of each value over the clients between the extremes. Source: arXiv:1803.01498."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.updates import ClientUpdates
from rayfed_lora.types import FloatArray


@rule("trimmed-mean", source="1803.01498", summary="mean without the extremes (Yin et al.)")
def trimmed_mean(
    start: Mapping[str, FloatArray],
    updates: ClientUpdates,
    *,
    share: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1,
) -> dict[str, FloatArray]:
    """Return, value by value, the plain mean without the largest and the smallest ones.

    Of n clients, floor(share * n) are left out on each side: Definition 2 of the paper, with beta =
    share. Clients count the same, whatever their number of examples.
    """
    cut = int(share * len(updates))
    kept = slice(cut, len(updates) - cut)
    return {name: np.sort(t, axis=0)[kept].mean(axis=0) for name, t in updates.tensors.items()}
