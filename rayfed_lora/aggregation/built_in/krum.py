"""The mean of the clients whose updates are nearest to others.

Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.updates import ClientUpdates, Float64Array
from rayfed_lora.errors import RunError
from rayfed_lora.types import FloatArray


@rule("krum", source="NeurIPS 2017", summary="mean of the updates nearest to others (Krum)")
def krum(
    start: Mapping[str, FloatArray],
    updates: ClientUpdates,
    *,
    malicious: Annotated[int, Field(ge=0)] = 1,
    chosen: Annotated[int, Field(ge=1)] = 1,
) -> dict[str, Float64Array]:
    """Return the plain mean of the `chosen` clients of lowest score; 1 is Krum, more multi-Krum.

    The score of a client is the sum of its squared distances to its n - malicious - 2 nearest
    others, over all values.

    Raises:
        RunError: n < malicious + 3, or fewer clients than `chosen` arrived.
    """
    n = len(updates)
    near = n - malicious - 2
    if near < 1 or chosen > n:
        raise RunError(
            f"krum: expected at least {max(malicious + 3, chosen)} clients in a round, with"
            f" malicious {malicious} and chosen {chosen}, got {n}"
        )
    rows = np.concatenate([t.reshape(n, -1) for t in updates.tensors.values()], axis=1)
    rows = rows.astype(np.float64)
    squares = np.array([[float(np.sum((a - b) ** 2)) for b in rows] for a in rows])
    # Each client's distance to itself, 0, comes first.
    scores = np.sort(squares, axis=1)[:, 1 : near + 1].sum(axis=1)
    best = np.argsort(scores, kind="stable")[:chosen]
    return {name: tensor[best].mean(axis=0) for name, tensor in updates.tensors.items()}
