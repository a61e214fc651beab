"""The bytes of a round's messages under the codecs of a recipe. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from rayfed_lora.aggregation.messages import Counts, Traffic
from rayfed_lora.federation.traffic import RoundFacts
from rayfed_lora.lora.stacked import A, B
from rayfed_lora.types import ModelShape
from rayfed_lora.wire.update import BYTES_PER_VALUE, Shapes, UpdateMethod
from rayfed_lora.wire.upload import is_sent


class Encoding:
    """Counts the bytes of uploads and downloads from the shapes of their tensors."""

    def __init__(
        self, shape: ModelShape, up: UpdateMethod, down: UpdateMethod, *, own_b: bool
    ) -> None:
        """Take the codecs of both ways.

        Args:
            shape: the model.
            up: codec of uploads.
            down: codec of downloads.
            own_b: whether each client keeps its own B, which is not sent.
        """
        self._shape, self._up, self._down, self._own_b = shape, up, down, own_b

    @cached_property
    def whole(self) -> tuple[int, int]:
        """Bytes of an upload and of a download of every weight."""
        shapes = self._shape.tensors or {"model": (self._shape.total_params,)}
        return self._up.size(shapes), self._down.size(shapes)

    def messages(self, facts: RoundFacts, messages: Traffic) -> tuple[Counts, Counts]:
        """Return (cohort,) bytes of each client's whole upload and download.

        A way without a codec has 4 bytes a value of the rule's own messages.
        """
        received = facts.resizing.ranks if facts.resizing.cut is None else facts.resizing.cut
        return (
            self._way(self._up, facts, facts.resizing.ranks, messages.up),
            self._way(self._down, facts, received, messages.down),
        )

    def _way(
        self, codec: UpdateMethod, facts: RoundFacts, ranks: Mapping[str, int], values: Counts
    ) -> Counts:
        if codec.lossless:
            return values * BYTES_PER_VALUE
        if facts.trainable == "full":
            return np.full(len(facts.cohort), self.whole[0 if codec is self._up else 1], np.int64)
        most = max(ranks.values(), default=0)
        limits = np.full(len(facts.cohort), most) if facts.limits is None else facts.limits
        # Clients of the same limit send the same.
        each, place = np.unique(np.minimum(limits, most), return_inverse=True)
        sizes = [codec.size(self._shapes(facts, ranks, limit)) for limit in each.tolist()]
        return np.array(sizes, np.int64)[place]

    def _shapes(self, facts: RoundFacts, ranks: Mapping[str, int], limit: int) -> Shapes:
        """Return the shapes of one client's message in an adapter round, by `named`."""
        shape = self._shape
        known = all(name in shape.tensors for name in shape.head)
        found = {name: shape.tensors[name] for name in shape.head} if known else {}
        if not found and shape.head_params:
            found = {"head": (shape.head_params,)}
        for name, module in shape.modules.items():
            rank = min(ranks[name], limit)
            found |= {A + name: (rank, module.d_in), B + name: (module.d_out, rank)}
        return {n: s for n, s in found.items() if is_sent(n, facts.frozen, self._own_b)}
