"""The largest values of an update.

Source: Stich et al., "Sparsified SGD with Memory", arXiv:1809.07599; without a memory the rest is
lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from rayfed_lora.wire.update import Shapes, Stacked, update


@update("top-k", source="1809.07599", stacked=True, down=False)
@dataclass(frozen=True)
class TopK:
    """The `share` of largest magnitude of all values, with indices of 32 bits.

    k = max(1, ceil(share * n)) of the n values of the whole update; 8 bytes each.
    """

    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01

    def size(self, shapes: Shapes) -> int:
        """Return four bytes for each kept value and four for its index."""
        return 8 * self._kept(sum(map(math.prod, shapes.values())))

    def _kept(self, values: int) -> int:
        # 0.07 * 100 is a little more than 7 in floating point.
        return min(values, max(1, math.ceil(self.share * values - 1e-9)))

    def __call__(
        self, tensors: Stacked, rngs: Sequence[np.random.Generator]
    ) -> tuple[Stacked, int]:
        """Return zeros but for the kept values; of equal magnitudes any may be kept."""
        clients = len(rngs)
        rows = np.concatenate([x.reshape(clients, -1) for x in tensors.values()], axis=1)
        values = rows.shape[1]
        k = self._kept(values)
        if k == 0:
            return tensors, 0
        indices = np.argpartition(np.abs(rows), values - k, axis=1)[:, values - k :]
        indices = indices.astype(np.uint32)
        kept = np.take_along_axis(rows, indices, axis=1)
        seen = np.zeros_like(rows)
        np.put_along_axis(seen, indices, kept, axis=1)
        edges = np.cumsum([math.prod(x.shape[1:]) for x in tensors.values()])[:-1]
        parts = zip(tensors.items(), np.split(seen, edges, axis=1), strict=True)
        found = {name: part.reshape(x.shape) for (name, x), part in parts}
        return found, kept[0].nbytes + indices[0].nbytes
