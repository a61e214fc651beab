"""The tasks: `Initial`, `Train`, `Evaluate`, `TestClients`, `Export`. Frozen messages, picklable.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.objectives.remembered import Remembered
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientReport,
    ClientScore,
    FloatArray,
    GlobalModel,
    LocalPlan,
    Predictions,
    Split,
    Trainable,
)
from rayfed_lora.wire.upload import Upload

Block = tuple[int, ...]
# Factors B by module, of each client that keeps its own.
Personal = Mapping[int, Mapping[str, FloatArray]]
# Parts of a training: the messages of more would cost more than they balance.
_MOST_PARTS = 1024


@dataclass(frozen=True)
class Trained:
    """What comes back of some consecutive clients of a round.

    Attributes:
        reports: one a client, in order.
        means: what the run's rule needs of the usable updates.
    """

    reports: tuple[ClientReport, ...]
    means: Means


@dataclass(frozen=True)
class Train:
    """Train the clients of a round, and reduce their updates to what the rule needs.

    Attributes:
        model: that they start from.
        plan: the round.
        rule: name of the aggregation rule.
        blocks: clients that are trained together, block by block.
        limits: largest rank of a client, where it is limited.
        personal: of clients that have a B of their own.
        remembered: the objective, with the memory of these clients.
        upload: what happens to the updates; None: they arrive as they are.
        place: of this part in the round; None: the whole round.
        note: for the first client's report.
    """

    model: GlobalModel
    plan: LocalPlan
    rule: str
    blocks: tuple[Block, ...]
    limits: Mapping[int, int] = field(default_factory=dict)
    personal: Personal = field(default_factory=dict)
    remembered: Remembered = field(default_factory=Remembered)
    upload: Upload | None = None
    place: int | None = None
    note: str | None = None
    kind = "train"
    limited = True

    @property
    def units(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def size(self) -> int:
        """Number of clients."""
        return sum(map(len, self.blocks))

    @property
    def name(self) -> str:
        """The round, from 1, and the place of the block in it."""
        block = "" if self.place is None else f" block {self.place}"
        return f"round {self.plan.round + 1}{block}"

    @property
    def clients(self) -> Block:
        """All clients, in order."""
        return tuple(chain.from_iterable(self.blocks))

    def on(self, model: GlobalModel) -> Train:
        """Return the same training from another model."""
        return replace(self, model=model)

    def _of(self, blocks: Sequence[Block]) -> Train:
        """Return the same training of fewer clients, with what sets them apart."""
        part = replace(self, blocks=tuple(blocks))
        limits = {k: self.limits[k] for k in part.clients if k in self.limits}
        personal = {k: self.personal[k] for k in part.clients if k in self.personal}
        remembered = self.remembered.of(part.clients)
        plan = self.plan.of(part.clients)
        return replace(part, plan=plan, limits=limits, personal=personal, remembered=remembered)

    def parts(self) -> list[Train]:
        """Return a training for each block, or for runs of blocks where there are very many.

        Never a matter of how many workers there are, so that no result depends on that.
        """
        count = min(len(self.blocks), _MOST_PARTS)
        edges = [i * len(self.blocks) // count for i in range(count + 1)] if count else []
        cuts = enumerate(pairwise(edges))
        return [replace(self._of(self.blocks[low:high]), place=i) for i, (low, high) in cuts]

    def halves(self, reason: str | None) -> tuple[Train, ...]:
        """Return trainings of each block, or of the halves of the only one; none of one client."""
        if len(self.blocks) > 1:
            return tuple(self._of([block]) for block in self.blocks)
        (block,) = self.blocks
        if len(block) == 1:
            return ()
        middle = len(block) // 2
        first, second = self._of([block[:middle]]), self._of([block[middle:]])
        if reason is not None:
            first = replace(first, note=_joined_notes(self.note, f"{reason}; trained in halves"))
        return first, replace(second, note=None)

    def told_and_kept(self, result: Trained) -> tuple[Trained, Trained]:
        """Return the reports, and the means."""
        none = RULES[self.rule].means()
        return replace(result, means=none), replace(result, reports=())

    def joined(self, results: Sequence[Trained]) -> Trained:
        """Return all reports, and the means joined in order."""
        if len(results) == 1:
            return results[0]
        means = RULES[self.rule].means()
        for result in results:
            means.join(result.means)
        means.pack()
        return Trained(tuple(chain.from_iterable(r.reports for r in results)), means)


def _joined_notes(*notes: str | None) -> str:
    return "; ".join(note for note in notes if note is not None)


@dataclass(frozen=True)
class Evaluate:
    """Predict rows of a split.

    Attributes:
        model: that predicts.
        split: whose rows.
        shards: rows, a shard in each part.
    """

    model: GlobalModel
    split: Split
    shards: tuple[slice, ...]
    limited = True
    units = 1
    size = 0

    @property
    def kind(self) -> str:
        """With the split."""
        return f"evaluate {self.split}"

    @property
    def name(self) -> str:
        """The kind."""
        return self.kind

    def on(self, model: GlobalModel) -> Evaluate:
        """Return the same evaluation of another model."""
        return replace(self, model=model)

    def parts(self) -> list[Evaluate]:
        """Return an evaluation of each shard."""
        return [replace(self, shards=(shard,)) for shard in self.shards]

    def halves(self, reason: str | None) -> tuple[Evaluate, ...]:
        """Return evaluations of each shard, or of the halves of the only one; none of one row.

        Metrics are computed over all rows in their order: no score depends on it.
        """
        del reason
        if len(self.shards) > 1:
            return tuple(self.parts())
        (rows,) = self.shards
        middle = (rows.start + rows.stop) // 2
        if middle == rows.start:
            return ()
        halves = (slice(rows.start, middle), slice(middle, rows.stop))
        return tuple(replace(self, shards=(half,)) for half in halves)

    def joined(self, results: Sequence[tuple[Predictions, ...]]) -> tuple[Predictions, ...]:
        """Return the predictions by shard, in order."""
        return tuple(chain.from_iterable(results))


@dataclass(frozen=True)
class Generate(Evaluate):
    """Answer prompts of the test split; a shard of them in each part.

    The result is the answers in order.
    """

    @property
    def kind(self) -> str:
        """What it does."""
        return "generate"


@dataclass(frozen=True)
class TestClients:
    """Test the model on clients' own held-out examples.

    Attributes:
        model: that is tested.
        blocks: clients, a block in each part.
        limits, personal: as of `Train`; a client with a B of its own is tested with that.
    """

    # Not one of pytest's, whatever its name begins with.
    __test__ = False

    model: GlobalModel
    blocks: tuple[Block, ...]
    limits: Mapping[int, int] = field(default_factory=dict)
    personal: Personal = field(default_factory=dict)
    kind = "test clients"
    name = "test clients"
    limited = True
    units = 1
    size = 0

    @property
    def clients(self) -> Block:
        """All clients, in order."""
        return tuple(chain.from_iterable(self.blocks))

    def on(self, model: GlobalModel) -> TestClients:
        """Return the same tests of another model."""
        return replace(self, model=model)

    def _of(self, block: Block) -> TestClients:
        """Return the tests of fewer clients, with what sets them apart."""
        limits = {k: self.limits[k] for k in block if k in self.limits}
        personal = {k: self.personal[k] for k in block if k in self.personal}
        return replace(self, blocks=(block,), limits=limits, personal=personal)

    def parts(self) -> list[TestClients]:
        """Return the tests of each block."""
        return [self._of(block) for block in self.blocks]

    def halves(self, reason: str | None) -> tuple[TestClients, ...]:
        """Return tests of each block, or of the halves of the only one; none of one client."""
        del reason
        if len(self.blocks) > 1:
            return tuple(self.parts())
        (block,) = self.blocks
        middle = len(block) // 2
        return (self._of(block[:middle]), self._of(block[middle:])) if middle > 0 else ()

    def joined(self, results: Sequence[tuple[ClientScore, ...]]) -> tuple[ClientScore, ...]:
        """Return all scores, in order."""
        return tuple(chain.from_iterable(results))


@dataclass(frozen=True)
class Export:
    """Return the files of a model, by path inside the run folder."""

    model: GlobalModel
    kind = "export"
    name = "the export"
    limited = False
    units = 1
    size = 0

    def on(self, model: GlobalModel) -> Export:
        """Return the same for another model."""
        return Export(model)

    def parts(self) -> list[Export]:
        """Return itself: one trainer answers."""
        return [self]

    def halves(self, reason: str | None) -> tuple[Export, ...]:
        """Return none."""
        del reason
        return ()

    def joined(self, results: Sequence[dict[str, bytes]]) -> dict[str, bytes]:
        """Return the one result."""
        return results[0]


@dataclass(frozen=True)
class Initial:
    """Return the dense tensors that the first round starts from.

    Attributes:
        trainable: `full`: every weight as the source has it; `adapter`: the head.
    """

    trainable: Trainable
    kind = "initial tensors"
    name = "the first tensors"
    limited = False
    units = 1
    size = 0

    @property
    def model(self) -> GlobalModel:
        """An empty one: there is none yet."""
        return GlobalModel(AdapterState({}, {}), Base(), self.trainable)

    def on(self, model: GlobalModel) -> Initial:
        """Return the same: the answer does not depend on the model."""
        del model
        return self

    def parts(self) -> list[Initial]:
        """Return itself: one trainer answers."""
        return [self]

    def halves(self, reason: str | None) -> tuple[Initial, ...]:
        """Return none."""
        del reason
        return ()

    def joined(self, results: Sequence[dict[str, FloatArray]]) -> dict[str, FloatArray]:
        """Return the one result."""
        return results[0]
