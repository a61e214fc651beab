"""The communication ledger: what a real network would carry, not what Ray moves.

Source: docs/method.md, "The communication ledger".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.aggregation.messages import Counts, Traffic
from rayfed_lora.aggregation.rule import Rule
from rayfed_lora.federation.bills import Bill, Totals
from rayfed_lora.federation.encoding import Encoding
from rayfed_lora.federation.traffic import Mask, RoundFacts, traffic, with_objective
from rayfed_lora.objectives.objective import Objective
from rayfed_lora.types import ModelShape
from rayfed_lora.wire.update import BYTES_PER_VALUE

_NEVER = -1


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
    facts: RoundFacts,
    messages: Traffic,
    base: tuple[Counts, Counts],
    total_params: int,
    encoding: Encoding | None,
) -> Bill:
    """Return what was sent of the messages of a round; `base` in values and in bytes.

    `encoding` None: 4 bytes a value.
    """
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
    values, stored = map(downloaded, base)
    count = int(arrived.sum())
    bill = Bill(uploaded(messages.up), down, values, count, fedavg, base_bytes=stored)
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
        # Whether full-model rounds have replaced the source's base.
        self._replaced = False

    def quote(self, facts: RoundFacts) -> Bill:
        """Return the bill of a round without booking it."""
        kept = dict(self._factors), self._held, self.totals
        steps, replaced = len(self._steps), self._replaced
        self._held = {kind: versions.copy() for kind, versions in self._held.items()}
        try:
            return self.book(facts)
        finally:
            self._factors, self._held, self.totals = kept
            self._replaced = replaced
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
        base, stored = np.zeros_like(members), np.zeros_like(members)
        began, served = _reached(facts, messages)
        if facts.trainable == "adapter":
            base, stored = self._catch_up(members, len(self._steps) - (folded > 0))
            missing = self._missing_factors(facts, members, began, messages)
            base, stored = base + missing, stored + missing * BYTES_PER_VALUE
            self._renew(members[served], messages)
        self._held["base"][members[began]] = len(self._steps)
        if messages.merge:
            self._step(messages.merge)
        self._held["base"][members[served]] = len(self._steps)
        if facts.trainable == "full" and facts.arrived.any():
            self._step(self._shape.base_params)
            self._replaced = True
            self._factors["head"] = self._factors.get("head", 0) + 1
        total = self._shape.total_params
        bill = _bill(facts, messages, (base, stored), total, self._encoding)
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

    def _catch_up(self, members: Counts, version: int) -> tuple[Counts, Counts]:
        """Return the values each member must be sent to hold a base version, and their bytes.

        The source's base is sent as it is stored, one that full-model rounds left in float32.
        """
        whole = self._shape.base_params
        bytes_of_whole = whole * BYTES_PER_VALUE
        if self._shape.stored_base_bytes is not None and not self._replaced:
            bytes_of_whole = self._shape.stored_base_bytes
        held = self._held["base"][members]
        # Only the members' own versions are looked up: a run may have very many of them.
        behind = np.array([self._behind[i] for i in np.maximum(held, 0).tolist()], dtype=np.int64)
        missed = np.maximum(self._behind[version] - behind, 0)
        values = np.where(held == _NEVER, whole, np.minimum(missed, whole))
        rest = np.minimum(values * BYTES_PER_VALUE, bytes_of_whole)
        return values, np.where(held == _NEVER, bytes_of_whole, rest)

    def snapshot(self) -> tuple[dict[str, object], dict[str, Counts]]:
        """Return what a checkpoint keeps: JSON values, and by kind the (clients,) held versions."""
        steps, factors, totals = list(self._steps), dict(self._factors), asdict(self.totals)
        facts: dict[str, object] = {"steps": steps, "factors": factors, "totals": totals}
        return facts, {kind: held.copy() for kind, held in self._held.items()}

    def restore(self, facts: Mapping[str, Any], held: Mapping[str, Counts]) -> None:
        """Go back to a snapshot, whose `totals` may be a `Totals` already."""
        self._steps, self._factors = list(facts["steps"]), dict(facts["factors"])
        self._behind = [0, *accumulate(self._steps)]
        self._replaced = self._shape.base_params in self._steps
        totals = facts["totals"]
        self.totals = totals if isinstance(totals, Totals) else Totals(**totals)
        self._held = {kind: versions.copy() for kind, versions in held.items()}
