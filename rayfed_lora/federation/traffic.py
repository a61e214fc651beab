"""How large the messages of a round are, under each aggregation rule.

Source: docs/method.md, "Aggregation rules" (sent up / down) and "The communication ledger".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rayfed_lora.recipe.rule_facts import RuleFacts
from rayfed_lora.types import Frozen, ModelShape, ModuleShape, Trainable

Counts = npt.NDArray[np.int64]
Ranks = Mapping[str, int]
_NO_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Sent:
    """How much of the messages of a round went through, by the simulated clock.

    Attributes:
        absent: (cohort,) who left or came too late.
        down, up: (cohort,) share of its download and of its upload.
    """

    absent: npt.NDArray[np.bool_]
    down: npt.NDArray[np.float64]
    up: npt.NDArray[np.float64]


@dataclass(frozen=True)
class RoundFacts:
    """What decides the messages of a round.

    Attributes:
        trainable: `full` or `adapter`.
        cohort: its clients.
        arrived: (cohort,) whose update arrived.
        ranks: rank by module; not looked at in a full-model round.
        limits: (cohort,) largest rank of each client, None where none is limited.
        frozen: the factor that is not trained.
        ranks_before: rank by module of what the round starts from, where it differs: in a round
            whose shrink is folded, clients get the factors before the cut, to fold the rest
            themselves.
        folded: number of values in what that shrink folds into the base.
        resized: whether the server has cut A and B since the last round's result. A
            rise needs no message: all draw the new rows of A from the seed.
        stepped: whether the server goes another way than to the mean: what the averages lack of it
            has the rank of one more client then, that of the start.
        after_initiating: whether the round is after the initiating stage.
        sent: what became of the messages of clients that left or came too late; None: all of each
            message is sent.
    """

    trainable: Trainable
    cohort: Sequence[int]
    arrived: npt.NDArray[np.bool_]
    ranks: Ranks = field(default_factory=dict)
    limits: Counts | None = None
    frozen: Frozen | None = None
    ranks_before: Ranks | None = None
    folded: int = 0
    resized: bool = False
    stepped: bool = False
    after_initiating: bool = True
    sent: Sent | None = None


@dataclass(frozen=True)
class Traffic:
    """The messages of one round, in values, base not included.

    Attributes:
        up: (cohort,) each client's upload, where it arrives.
        down: (cohort,) each client's download.
        merge: what the round's merge adds to the base: who misses it must be sent that much.
        frozen: by kind (the factors `a`, `b`; `head`), what a client needs to start from that does
            not hold the current one, and that no other message brings.
        renewed: kinds that the download brings up to the end of the round.
    """

    up: Counts
    down: Counts
    merge: int = 0
    frozen: Mapping[str, int] = field(default_factory=dict)
    renewed: tuple[str, ...] = ()


def traffic(shape: ModelShape, rule: RuleFacts, facts: RoundFacts) -> Traffic:
    """Return the messages of a round.

    A full-model round sends every weight both ways. In an adapter round, sent are the factors
    that are trained, at each client's rank, and the head. A client with its own B sends A only.
    Where the result goes into the base, the download is that result: the factors of all clients
    that arrived (`stack`), or the averages and the factors of what they lack (`residual`), of rank
    (clients - 1) * r, or clients * r where the server's learning rate is not 1, or the matrix
    itself where that is smaller.

    Args:
        shape: the model's sizes.
        rule: the aggregation rule.
        facts: of the round.
    """
    if facts.trainable == "full":
        whole = np.full(len(facts.cohort), shape.total_params, np.int64)
        return Traffic(whole, whole)
    ranks = facts.ranks
    start = ranks if facts.ranks_before is None else facts.ranks_before
    both: tuple[Frozen, ...] = ("a", "b")
    limits = np.full(len(facts.cohort), _NO_LIMIT) if facts.limits is None else facts.limits
    kinds: tuple[Frozen, ...] = tuple(kind for kind in both if kind != facts.frozen)
    kinds = ("a",) if rule.personal else kinds
    up = _size(shape.modules, ranks, limits, kinds) + shape.head_params
    size: dict[str, int] = {
        k: int(_size(shape.modules, start, np.array([_NO_LIMIT]), (k,))[0]) for k in both
    }
    # A download that is the round's result leaves out where the round starts from.
    head = {"head": shape.head_params}
    if rule.merges == "stack":
        merge = int(_size(shape.modules, ranks, limits, both)[facts.arrived].sum())
        down = np.full_like(up, merge + shape.head_params)
        return Traffic(up, down, merge, frozen=head, renewed=("head",))
    if rule.merges == "residual":
        merge = _residual(shape.modules, ranks, int(facts.arrived.sum()) - 1 + facts.stepped)
        return Traffic(up, up + merge, merge, frozen={**size, **head}, renewed=("a", "b", "head"))
    if rule.trains == "turns":
        return Traffic(up, up, frozen={**size, **head}, renewed=(*kinds, "head"))
    down = _size(shape.modules, start, limits, kinds) + shape.head_params
    return Traffic(up, down, frozen={"a": size["a"]} if rule.trains == "b" else {})


def _size(
    modules: Mapping[str, ModuleShape], ranks: Ranks, limits: Counts, kinds: Sequence[Frozen]
) -> Counts:
    """Return the values in some kinds of factors, (cohort,)."""
    # By rank: there are few of those, and many modules.
    sides: dict[int, int] = {}
    for name, module in modules.items():
        side = module.d_in * ("a" in kinds) + module.d_out * ("b" in kinds)
        sides[ranks[name]] = sides.get(ranks[name], 0) + side
    total = np.zeros(len(limits), np.int64)
    for rank, side in sides.items():
        total += np.minimum(limits, rank) * side
    return total


def _residual(modules: Mapping[str, ModuleShape], ranks: Ranks, times: int) -> int:
    """Return the values in updates of so many times the rank, or in matrices where fewer."""
    total = 0
    for name, module in modules.items():
        rank = max(times, 0) * ranks[name]
        total += min(rank * (module.d_in + module.d_out), module.d_in * module.d_out)
    return total
