"""The communication ledger: what a real network would carry, not what Ray moves.

Source: docs/method.md, "The communication ledger".
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
from rayfed_lora.federation.encoding import Encoding
from rayfed_lora.federation.traffic import Mask, RoundFacts, traffic, with_objective
from rayfed_lora.objectives.objective import Objective
from rayfed_lora.types import ModelShape
from rayfed_lora.wire.update import BYTES_PER_VALUE

_NEVER = -1


@dataclass(frozen=True)
class Bill:
    """What one round sent, in values.

    Attributes:
        up: (cohort,) each client's upload, 0 where none arrived.
        down: (cohort,) each client's download, base not included.
        base: (cohort,) the frozen base, and frozen factors, that each client was sent.
        arrived: number of uploads.
        fedavg: values that FedAvg would have sent both ways with the same clients and shares.
        up_bytes, down_bytes: (cohort,) the messages in bytes, as encoded; None: 4 a value.
        fedavg_bytes: what FedAvg would have sent under the same codecs; None: 4 a value.
    """

    up: Counts
    down: Counts
    base: Counts
    arrived: int
    fedavg: int = 0
    up_bytes: Counts | None = None
    down_bytes: Counts | None = None
    fedavg_bytes: int | None = None

    @property
    def sent_up(self) -> Counts:
        """(cohort,) bytes of each client's upload."""
        return self.up * BYTES_PER_VALUE if self.up_bytes is None else self.up_bytes

    @property
    def sent_down(self) -> Counts:
        """(cohort,) bytes of each client's download, base not included."""
        return self.down * BYTES_PER_VALUE if self.down_bytes is None else self.down_bytes

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
    """Bytes of a run so far; `later`, `later_*`: of the rounds after the initiating stage.

    `encoded`: FedAvg's under the same codecs; None: as `fedavg`, which is in float32.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_base: int = 0
    fedavg: int = 0
    later: int = 0
    later_base: int = 0
    later_fedavg: int = 0
    encoded: int | None = None

    def communication(self) -> dict[str, float | int | None]:
        """Return the summary's `communication`; a reduction without rounds behind it is None.

        reduction = 1 - (up + down) / FedAvg's, with the same clients, rounds and participation.
        """
        total = self.bytes_up + self.bytes_down
        encoded = self.fedavg if self.encoded is None else self.encoded
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_base": self.bytes_base,
            "total_bytes": total,
            "fedavg_total_bytes": self.fedavg,
            "fedavg_total_bytes_same_codec": encoded,
            "reduction_vs_fedavg": _reduction(total, self.fedavg),
            "reduction_vs_fedavg_same_codec": _reduction(total, encoded),
            "reduction_vs_fedavg_with_base": _reduction(total + self.bytes_base, self.fedavg),
            "reduction_vs_fedavg_after_initiating": _reduction(self.later, self.later_fedavg),
            "reduction_vs_fedavg_with_base_after_initiating": _reduction(
                self.later + self.later_base, self.later_fedavg
            ),
        }

    def plus(self, bill: Bill, after_initiating: bool) -> Totals:
        """Return the totals after one more round."""
        up, down = int(bill.sent_up.sum()), int(bill.sent_down.sum())
        base, fedavg = bill.base_params * BYTES_PER_VALUE, bill.fedavg * BYTES_PER_VALUE
        encoded = self.encoded
        if bill.fedavg_bytes is not None:
            encoded = (self.fedavg if encoded is None else encoded) + bill.fedavg_bytes
        return Totals(
            bytes_up=self.bytes_up + up,
            bytes_down=self.bytes_down + down,
            bytes_base=self.bytes_base + base,
            fedavg=self.fedavg + fedavg,
            later=self.later + (up + down) * after_initiating,
            later_base=self.later_base + base * after_initiating,
            later_fedavg=self.later_fedavg + fedavg * after_initiating,
            encoded=encoded,
        )


def _reduction(sent: int, fedavg: int) -> float | None:
    return None if fedavg == 0 else 1.0 - sent / fedavg


def _brings_result(messages: Traffic) -> bool:
    """Return whether the download is the round's result, and not what the round starts from."""
    return messages.merge > 0 or len(messages.renewed) > 0


def _reached(facts: RoundFacts, messages: Traffic) -> tuple[Mask, Mask]:
    """Return (cohort,) which clients got the round's start, and which got all its messages."""
    if facts.sent is None:
        everyone = np.ones(len(facts.cohort), bool)
        return everyone, everyone
    stayed = ~facts.sent.absent
    began = stayed | (facts.sent.down >= 1.0)
    return began, stayed if _brings_result(messages) else began


def _bill(
    facts: RoundFacts, messages: Traffic, base: Counts, total_params: int, encoding: Encoding | None
) -> Bill:
    """Return what was sent of the messages of a round; `encoding` None: 4 bytes a value."""
    arrived, sent = facts.arrived, facts.sent
    whole = np.full(len(arrived), total_params, np.int64)

    def uploaded(values: Counts) -> Counts:
        here = np.where(arrived, values, 0)
        return here if sent is None else np.where(sent.absent, _part(values, sent.up), here)

    def downloaded(values: Counts) -> Counts:
        return values if sent is None else np.where(sent.absent, _part(values, sent.down), values)

    def received(values: Counts) -> Counts:
        if sent is not None and _brings_result(messages):
            # A result is sent when the round is over, to the clients that are still there.
            return np.where(sent.absent, 0, values)
        return downloaded(values)

    down = received(messages.down)
    fedavg = int(uploaded(whole).sum() + downloaded(whole).sum())
    bill = Bill(uploaded(messages.up), down, downloaded(base), int(arrived.sum()), fedavg)
    if encoding is None:
        return bill
    up_bytes, down_bytes = encoding.messages(facts, messages)
    whole_up, whole_down = (np.full(len(arrived), size) for size in encoding.whole)
    return replace(
        bill,
        up_bytes=uploaded(up_bytes),
        down_bytes=received(down_bytes),
        fedavg_bytes=int(uploaded(whole_up).sum() + downloaded(whole_down).sum()),
    )


def _part(values: Counts, share: npt.NDArray[np.float64]) -> Counts:
    return np.floor(values * share).astype(np.int64)


class Ledger:
    """Books every message of a run and remembers what frozen weights each client holds.

    A base version is replaced as a whole, or extended by an update that a client can catch up on
    by that update's factors alone. Frozen factors are versions too, and so is the head where a
    download does not bring it: the first of each is drawn from the seed that all share, and costs
    nothing.
    """

    def __init__(
        self,
        shape: ModelShape,
        clients: int,
        rule: Rule,
        objective: Objective | None = None,
        encoding: Encoding | None = None,
        *,
        given: bool = False,
    ) -> None:
        """Start with no client holding any base.

        Args:
            shape: of the model.
            clients: number of all.
            rule: of aggregation.
            objective: of local training; None: one that sends nothing.
            encoding: of messages; None: float32.
            given: whether factors and head are those of an adapter, which no client has.
        """
        self._encoding = encoding
        self._shape = shape
        self._objective = objective
        self._clients = clients
        self._rule = rule
        self._held = {"base": np.full(clients, _NEVER, np.int64)}
        # Cost of the step from version i to i + 1, in values; a replacement costs the whole base.
        self._steps: list[int] = []
        # By version i, the sum of the steps before it.
        self._behind: list[int] = [0]
        self._factors: dict[str, int] = dict.fromkeys(("a", "b", "head"), 1) if given else {}
        self.totals = Totals()

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

        A full-model round sends the base, and replaces it; in an adapter round the base, or the
        updates that a client missed, go to the clients that lack them. A client that failed sent
        nothing; one that left or was too late, the share of its messages sent by then.
        """
        folded = facts.resizing.folded_params
        if folded:
            self._step(folded)
        messages = traffic(self._shape, self._rule, facts)
        if self._objective is not None:
            messages = with_objective(messages, self._objective, self._shape, facts)
        if not facts.arrived.any():
            # Nothing is aggregated: what the round starts from stays as it is.
            messages = replace(messages, merge=0, renewed=())
        members = np.asarray(facts.cohort, dtype=np.int64)
        base = np.zeros_like(members)
        began, served = _reached(facts, messages)
        if facts.trainable == "adapter":
            base += self._catch_up(members, len(self._steps) - (folded > 0))
            base += self._missing_factors(facts, members, began, messages)
            self._renew(members[served], messages)
        self._held["base"][members[began]] = len(self._steps)
        if messages.merge:
            self._step(messages.merge)
        self._held["base"][members[served]] = len(self._steps)
        if facts.trainable == "full" and facts.arrived.any():
            self._step(self._shape.base_params)
            self._factors["head"] = self._factors.get("head", 0) + 1
        bill = _bill(facts, messages, base, self._shape.total_params, self._encoding)
        self.totals = self.totals.plus(bill, facts.after_initiating)
        return bill

    def _step(self, cost: int) -> None:
        """Add a version of the base."""
        self._steps.append(cost)
        self._behind.append(self._behind[-1] + cost)

    def _missing_factors(
        self, facts: RoundFacts, members: Counts, began: Mask, messages: Traffic
    ) -> Counts:
        """Return the frozen factors that members lack; the `began` ones then hold the current.

        A cut makes new factors. A client that holds A and B truncates locally, at no cost; where
        the rest is folded, all members are sent the factors before the cut, and do so.
        """
        for kind in messages.frozen:
            self._held.setdefault(kind, np.zeros(self._clients, np.int64))
        cut = ("a", "b") if facts.resizing.shrunk else ()
        know = np.full(self._clients, set(cut) <= messages.frozen.keys())
        for kind in cut:
            know &= self._held.get(kind, 0) == self._factors.get(kind, 0)
        if not facts.resizing.folded_params:
            self._raise(cut, know)
        missing = np.zeros_like(members)
        for kind, size in messages.frozen.items():
            held, now = self._held[kind], self._factors.get(kind, 0)
            missing += np.where(held[members] < now, size, 0)
            held[members[began]] = now
        if facts.resizing.folded_params:
            know[members[began]] = True
            self._raise(cut, know)
        return missing

    def _raise(self, kinds: Sequence[str], know: Mask) -> None:
        """Replace frozen factors by new ones, which the clients in `know` hold already."""
        for kind in kinds:
            self._factors[kind] = self._factors.get(kind, 0) + 1
            if kind in self._held:
                self._held[kind][know] = self._factors[kind]

    def _renew(self, served: Counts, messages: Traffic) -> None:
        """Note the factors that the result of a round brings to the clients it is sent to."""
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

    def snapshot(self) -> tuple[dict[str, object], dict[str, Counts]]:
        """Return what a checkpoint keeps: JSON values, and by kind the (clients,) held versions."""
        steps, factors, totals = list(self._steps), dict(self._factors), asdict(self.totals)
        facts: dict[str, object] = {"steps": steps, "factors": factors, "totals": totals}
        return facts, {kind: held.copy() for kind, held in self._held.items()}

    def restore(self, facts: Mapping[str, Any], held: Mapping[str, Counts]) -> None:
        """Go back to a snapshot, whose `totals` may be a `Totals` already."""
        self._steps, self._factors = list(facts["steps"]), dict(facts["factors"])
        self._behind = [0, *accumulate(self._steps)]
        totals = facts["totals"]
        self.totals = totals if isinstance(totals, Totals) else Totals(**totals)
        self._held = {kind: versions.copy() for kind, versions in held.items()}
