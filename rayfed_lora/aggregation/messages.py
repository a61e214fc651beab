"""The sizes of a round's messages, in values; each rule computes its own from an `AdapterRound`.

Source: docs/method.md, "Aggregation rules" (sent up / down) and "The communication ledger".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rayfed_lora.types import Frozen, ModuleShape

Counts = npt.NDArray[np.int64]
Ranks = Mapping[str, int]


@dataclass(frozen=True)
class Traffic:
    """The messages of one round, in values, base not included.

    Attributes:
        up: (cohort,) each client's upload, where it arrives.
        down: (cohort,) each client's download.
        merge: size of the update that the round merges into the base: a client that missed it is
            sent this much.
        frozen: by kind (the factors `a`, `b`; `head`), values that a client without the current
            ones must be sent before it starts, since no other message brings them.
        renewed: kinds that the download brings up to the end of the round.
    """

    up: Counts
    down: Counts
    merge: int = 0
    frozen: Mapping[str, int] = field(default_factory=dict)
    renewed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AdapterRound:
    """The sizes and events of an adapter round that its messages depend on.

    Attributes:
        modules: the adapted modules by name.
        head: number of values in the densely trained head.
        ranks: rank by module in this round.
        received: rank by module of the state that clients are sent; above `ranks` where a cut is
            folded, since each client folds the rest itself.
        limits: (cohort,) largest rank of each client.
        arrived: (cohort,) whether the client's update arrived.
        frozen: the factor that no client trains, if any.
        stepped: whether the server's learning rate is not 1.
    """

    modules: Mapping[str, ModuleShape]
    head: int
    ranks: Ranks
    received: Ranks
    limits: Counts
    arrived: npt.NDArray[np.bool_]
    frozen: Frozen | None = None
    stepped: bool = False

    @property
    def trained(self) -> tuple[Frozen, ...]:
        """The factors that clients train."""
        both: tuple[Frozen, ...] = ("a", "b")
        return tuple(kind for kind in both if kind != self.frozen)

    def up(self, *kinds: Frozen) -> Counts:
        """Return (cohort,) the values of these factors at each client's rank, and of the head."""
        return self.factors(*kinds) + self.head

    def down(self, *kinds: Frozen) -> Counts:
        """Return the same at the ranks that clients are sent."""
        return self._values(self.received, kinds) + self.head

    def factors(self, *kinds: Frozen) -> Counts:
        """Return (cohort,) the values of these factors at each client's rank."""
        return self._values(self.ranks, kinds)

    def whole(self, *kinds: Frozen) -> dict[str, int]:
        """Return by kind the values of the global factors that the round starts from."""
        sides = {name: {"a": m.d_in, "b": m.d_out} for name, m in self.modules.items()}
        return {k: sum(self.received[n] * side[k] for n, side in sides.items()) for k in kinds}

    def _values(self, ranks: Ranks, kinds: tuple[Frozen, ...]) -> Counts:
        # Grouped by rank: ranks are few, modules many.
        sides: dict[int, int] = defaultdict(int)
        for name, module in self.modules.items():
            sides[ranks[name]] += module.d_in * ("a" in kinds) + module.d_out * ("b" in kinds)
        each = [np.minimum(self.limits, rank) * side for rank, side in sides.items()]
        return sum(each, np.zeros(len(self.limits), np.int64))


def trained_factors(sizes: AdapterRound) -> Traffic:
    """Return the messages of most rules: the trained factors and the head, down and up again."""
    return Traffic(sizes.up(*sizes.trained), sizes.down(*sizes.trained))
