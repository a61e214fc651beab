"""The communication ledger: what a real network would carry, not what Ray moves.

Source: this project (docs/method.md, "The communication ledger").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.messages import Counts, Traffic
from rayfed_lora.aggregation.rule import Rule
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.federation.traffic import RoundFacts, traffic
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import ModelShape

BYTES_A_VALUE = 4
_NEVER = -1


@dataclass(frozen=True)
class Bill:
    """What one round sent, in values.

    Attributes:
        up: (cohort,) each client's upload, 0 where none arrived.
        down: (cohort,) each client's download, base not included.
        base: (cohort,) the frozen base, and frozen factors, that each client was sent.
        arrived: number of uploads.
        fedavg: values that FedAvg would have sent both ways, to and by the same clients as far.
    """

    up: Counts
    down: Counts
    base: Counts
    arrived: int
    fedavg: int = 0

    @property
    def params_up(self) -> int:
        """Values sent by the cohort."""
        return int(self.up.sum())

    @property
    def params_down(self) -> int:
        """Values sent to the cohort, base not included."""
        return int(self.down.sum())

    @property
    def base_params(self) -> int:
        """Values of frozen base sent to the cohort."""
        return int(self.base.sum())


@dataclass(frozen=True)
class Totals:
    """Bytes of a run so far; the `later_` ones are of the rounds after the initiating stage."""

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_base: int = 0
    fedavg: int = 0
    later: int = 0
    later_base: int = 0
    later_fedavg: int = 0

    def communication(self) -> dict[str, float | int | None]:
        """Return the summary's `communication`; a reduction without rounds behind it is None.

        reduction = 1 - (up + down) / FedAvg's, with the same clients, rounds and participation.
        """
        total = self.bytes_up + self.bytes_down
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_base": self.bytes_base,
            "total_bytes": total,
            "fedavg_total_bytes": self.fedavg,
            "reduction_vs_fedavg": _reduction(total, self.fedavg),
            "reduction_vs_fedavg_with_base": _reduction(total + self.bytes_base, self.fedavg),
            "reduction_vs_fedavg_after_initiating": _reduction(self.later, self.later_fedavg),
            "reduction_vs_fedavg_with_base_after_initiating": _reduction(
                self.later + self.later_base, self.later_fedavg
            ),
        }


def _reduction(sent: int, fedavg: int) -> float | None:
    return None if fedavg == 0 else 1.0 - sent / fedavg


def _brings_result(messages: Traffic) -> bool:
    """Return whether the download is the round's result, and not what the round starts from."""
    return messages.merge > 0 or len(messages.renewed) > 0


def _reached(
    facts: RoundFacts, messages: Traffic
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return (cohort,) who got all that the round starts from, and who got all of its messages."""
    if facts.sent is None:
        everyone = np.ones(len(facts.cohort), bool)
        return everyone, everyone
    stayed = ~facts.sent.absent
    began = stayed | (facts.sent.down >= 1.0)
    return began, stayed if _brings_result(messages) else began


def _bill(facts: RoundFacts, messages: Traffic, base: Counts, total_params: int) -> Bill:
    """Return what was sent of the messages of a round."""
    arrived, sent = facts.arrived, facts.sent
    up, down = np.where(arrived, messages.up, 0), messages.down
    whole = np.full(len(arrived), total_params, np.int64)
    fedavg_up, fedavg_down = np.where(arrived, whole, 0), whole
    if sent is not None:
        up = np.where(sent.absent, _part(messages.up, sent.up), up)
        # A result is sent when the round is over, to those who are still there.
        got = np.zeros_like(down) if _brings_result(messages) else _part(down, sent.down)
        down = np.where(sent.absent, got, down)
        base = np.where(sent.absent, _part(base, sent.down), base)
        fedavg_up = np.where(sent.absent, _part(whole, sent.up), fedavg_up)
        fedavg_down = np.where(sent.absent, _part(whole, sent.down), fedavg_down)
    fedavg = int(fedavg_up.sum() + fedavg_down.sum())
    return Bill(up, down, base, int(arrived.sum()), fedavg)


def _part(values: Counts, share: npt.NDArray[np.float64]) -> Counts:
    return np.floor(values * share).astype(np.int64)


class Ledger:
    """Books every message of a run and remembers what frozen weights each client holds.

    A base version is replaced as a whole, or extended by an update that a client can catch up on
    by that update's factors alone. Frozen factors are versions too, and so is the head where a
    download does not bring it: the first of each is drawn from the seed that all share, and costs
    nothing.
    """

    def __init__(self, shape: ModelShape, clients: int, rule: Rule) -> None:
        """Start with no client holding any base.

        Args:
            shape: the model's sizes.
            clients: number of clients there are.
            rule: the aggregation rule.
        """
        self._shape = shape
        self._clients = clients
        self._rule = rule
        self._held = {"base": np.full(clients, _NEVER, dtype=np.int64)}
        # Cost of the step from version i to i + 1, in values; a replacement costs the whole base.
        self._steps: list[int] = []
        # Their running sums: of the steps before version i.
        self._behind: list[int] = [0]
        self._factors: dict[str, int] = {}
        self.totals = Totals()

    @classmethod
    def of(cls, recipe: Recipe, shape: ModelShape, clients: int) -> Ledger:
        """Return the ledger of a run before its first round."""
        return cls(shape, clients, RULES[recipe.aggregation.rule])

    def quote(self, facts: RoundFacts) -> Bill:
        """Return the bill of a round without booking it."""
        kept = dict(self._factors), self._held, self.totals
        steps = len(self._steps)
        self._held = {kind: versions.copy() for kind, versions in self._held.items()}
        try:
            return self.book(facts)
        finally:
            self._factors, self._held, self.totals = kept
            # Booking only adds steps: taking them off again does not copy all the earlier ones.
            del self._steps[steps:], self._behind[steps + 1 :]

    def book(self, facts: RoundFacts) -> Bill:
        """Book a round and return its bill.

        A full-model round brings the base with it, and leaves another one behind; in an adapter
        round the base, or what a client missed of it, goes to whom does not hold it. Nothing is
        booked as sent by a client that failed; of one that left or was too late, the share of its
        messages that had been sent by then.
        """
        if facts.folded:
            self._step(facts.folded)
        messages = traffic(self._shape, self._rule, facts)
        if not facts.arrived.any():
            # Nothing is aggregated: what the round starts from stays as it is.
            messages = replace(messages, merge=0, renewed=())
        members = np.asarray(facts.cohort, dtype=np.int64)
        base = np.zeros_like(members)
        began, served = _reached(facts, messages)
        if facts.trainable == "adapter":
            base += self._catch_up(members, len(self._steps) - (facts.folded > 0))
            base += self._missing_factors(facts, members, began, messages)
            self._renew(members[served], messages)
        self._held["base"][members[began]] = len(self._steps)
        if messages.merge:
            self._step(messages.merge)
        self._held["base"][members[served]] = len(self._steps)
        if facts.trainable == "full" and facts.arrived.any():
            self._step(self._shape.base_params)
            self._factors["head"] = self._factors.get("head", 0) + 1
        bill = _bill(facts, messages, base, self._shape.total_params)
        self._add(bill, facts.after_initiating)
        return bill

    def _step(self, cost: int) -> None:
        """Add a version of the base."""
        self._steps.append(cost)
        self._behind.append(self._behind[-1] + cost)

    def _missing_factors(
        self,
        facts: RoundFacts,
        members: Counts,
        began: npt.NDArray[np.bool_],
        messages: Traffic,
    ) -> Counts:
        """Return what members need of the frozen factors; those who began hold the current then.

        A cut makes new ones. Who holds A and B as they were makes the same cut; where it is
        folded, all of the round are sent them as they were, and do so.
        """
        for kind in messages.frozen:
            self._held.setdefault(kind, np.zeros(self._clients, np.int64))
        cut = ("a", "b") if facts.resized else ()
        know = np.full(self._clients, set(cut) <= messages.frozen.keys())
        for kind in cut:
            know &= self._held.get(kind, 0) == self._factors.get(kind, 0)
        if not facts.folded:
            self._raise(cut, know)
        missing = np.zeros_like(members)
        for kind, size in messages.frozen.items():
            held, now = self._held[kind], self._factors.get(kind, 0)
            missing += np.where(held[members] < now, size, 0)
            held[members[began]] = now
        if facts.folded:
            know[members[began]] = True
            self._raise(cut, know)
        return missing

    def _raise(self, kinds: Sequence[str], know: npt.NDArray[np.bool_]) -> None:
        """Replace frozen factors by new ones, which some clients hold already."""
        for kind in kinds:
            self._factors[kind] = self._factors.get(kind, 0) + 1
            if kind in self._held:
                self._held[kind][know] = self._factors[kind]

    def _renew(self, served: Counts, messages: Traffic) -> None:
        """Note what the result of a round brings to those who are sent it."""
        for kind in messages.renewed:
            self._factors[kind] = self._factors.get(kind, 0) + 1
            self._held[kind][served] = self._factors[kind]

    def _catch_up(self, members: Counts, version: int) -> Counts:
        """Return the values each member must be sent to hold a base version."""
        whole = self._shape.base_params
        held = self._held["base"][members]
        # Only the members' own versions are looked up: a run may have very many of them.
        behind = np.array([self._behind[i] for i in np.maximum(held, 0).tolist()], dtype=np.int64)
        missed = np.maximum(self._behind[version] - behind, 0)
        return np.where(held == _NEVER, whole, np.minimum(missed, whole))

    def _add(self, bill: Bill, after_initiating: bool) -> None:
        t = self.totals
        up, down = bill.params_up * BYTES_A_VALUE, bill.params_down * BYTES_A_VALUE
        base = bill.base_params * BYTES_A_VALUE
        fedavg = bill.fedavg * BYTES_A_VALUE
        self.totals = replace(
            t,
            bytes_up=t.bytes_up + up,
            bytes_down=t.bytes_down + down,
            bytes_base=t.bytes_base + base,
            fedavg=t.fedavg + fedavg,
            later=t.later + (up + down) * after_initiating,
            later_base=t.later_base + base * after_initiating,
            later_fedavg=t.later_fedavg + fedavg * after_initiating,
        )

    def snapshot(self) -> tuple[dict[str, object], dict[str, Counts]]:
        """Return what a checkpoint keeps: JSON values, and by kind the (clients,) held versions."""
        facts: dict[str, object] = {
            "steps": list(self._steps),
            "factors": dict(self._factors),
            "totals": asdict(self.totals),
        }
        return facts, {kind: held.copy() for kind, held in self._held.items()}

    def restore(self, facts: Mapping[str, Any], held: Mapping[str, Counts]) -> None:
        """Go back to a snapshot.

        Args:
            facts: of the snapshot; `totals` may be a `Totals` already.
            held: of the snapshot.
        """
        self._steps, self._factors = list(facts["steps"]), dict(facts["factors"])
        self._behind = [0, *accumulate(self._steps)]
        totals = facts["totals"]
        self.totals = totals if isinstance(totals, Totals) else Totals(**totals)
        self._held = {kind: versions.copy() for kind, versions in held.items()}
