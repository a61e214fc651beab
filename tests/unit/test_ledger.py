"""The communication ledger against counts done by hand, and against a slow one of plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed_lora.federation.ledger import Ledger, Totals
from rayfed_lora.types import ModelShape, ModuleShape

# q is 4 -> 6: 10 values a rank; v is 3 -> 4: 7 values a rank.
SHAPE = ModelShape(
    modules={"q": ModuleShape(d_in=4, d_out=6), "v": ModuleShape(d_in=3, d_out=4)},
    head_params=6,
    total_params=47,
    head=("head",),
)
BASE = 47 - 6
RANKS = {"q": 2, "v": 1}
ADAPTER = 2 * 10 + 1 * 7 + 6


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(SHAPE, clients=4)


def test_a_full_round_sends_the_whole_model_both_ways_and_no_base_beside_it(ledger):
    bill = ledger.book("full", {}, (0, 2), 2, after_initiating=False)
    assert (bill.params_up, bill.params_down, bill.base_params) == (2 * 47, 2 * 47, 0)
    assert ledger.totals.bytes_up == 2 * 47 * 4


def test_an_adapter_round_sends_factors_at_each_modules_rank_and_the_head(ledger):
    bill = ledger.book("adapter", RANKS, (0, 1, 3), 3)
    assert (bill.up_params, bill.down_params) == (ADAPTER, ADAPTER) == (33, 33)
    assert (bill.params_up, bill.params_down) == (99, 99)


def test_an_adapter_of_rank_0_leaves_the_head_alone(ledger):
    bill = ledger.book("adapter", {"q": 0, "v": 0}, (1,), 1)
    assert (bill.params_up, bill.params_down) == (6, 6)


def test_a_model_without_a_trained_head_sends_factors_alone():
    ledger = Ledger(ModelShape(SHAPE.modules, head_params=0, total_params=47), clients=1)
    assert ledger.book("adapter", RANKS, (0,), 1).params_up == 27
    assert ledger.totals.bytes_base == 47 * 4


def test_a_client_is_sent_the_base_in_its_first_adapter_round_only(ledger):
    assert ledger.book("adapter", RANKS, (0, 1), 2).base_params == 2 * BASE
    assert ledger.book("adapter", RANKS, (0, 1), 2).base_params == 0
    assert ledger.book("adapter", RANKS, (1, 2), 2).base_params == BASE


def test_a_replaced_base_is_sent_once_more_to_each_participant(ledger):
    ledger.book("adapter", RANKS, (0, 1), 2)
    ledger.replace_base()
    assert ledger.book("adapter", RANKS, (0, 1), 2).base_params == 2 * BASE
    assert ledger.book("adapter", RANKS, (0, 1), 2).base_params == 0


def test_after_a_full_stage_every_participant_is_sent_the_new_base(ledger):
    # What a full round sends is the base before its aggregation; the aggregate is a newer one.
    ledger.book("full", {}, (0, 1, 2, 3), 4, after_initiating=False)
    ledger.replace_base()
    assert ledger.book("adapter", RANKS, (0, 1), 2).base_params == 2 * BASE


def test_a_full_round_brings_the_base_as_it_is_in_that_round(ledger):
    ledger.book("full", {}, (0, 1), 2)
    assert ledger.book("adapter", RANKS, (0, 1, 2), 3).base_params == BASE


def test_several_replacements_missed_cost_one_base(ledger):
    ledger.book("adapter", RANKS, (0,), 1)
    ledger.replace_base()
    ledger.replace_base()
    assert ledger.book("adapter", RANKS, (0,), 1).base_params == BASE


def test_a_failed_client_is_sent_its_download_and_the_base_but_uploads_nothing(ledger):
    bill = ledger.book("adapter", RANKS, (0, 1, 2), 1)
    assert (bill.sent, bill.arrived) == (3, 1)
    assert (bill.params_up, bill.params_down) == (33, 3 * 33)
    assert bill.base_params == 3 * BASE
    # FedAvg with the same participation: 3 models down, 1 up.
    assert ledger.totals.fedavg == 4 * 47 * 4


def test_a_fold_costs_no_base_bytes_where_all_take_part_but_downloads_the_rank_before_the_cut(
    ledger,
):
    ledger.book("adapter", {"q": 2, "v": 2}, (0, 1, 2, 3), 4)
    ledger.fold_base(10 + 7)
    bill = ledger.book("adapter", {"q": 1, "v": 1}, (0, 1, 2, 3), 4, down_ranks={"q": 2, "v": 2})
    assert bill.base_params == 0
    assert bill.up_params == 10 + 7 + 6
    assert bill.down_params == 2 * (10 + 7) + 6
    assert ledger.book("adapter", {"q": 1, "v": 1}, (0, 1, 2, 3), 4).base_params == 0


def test_who_missed_a_fold_is_charged_the_folded_factors_later(ledger):
    ledger.book("adapter", {"q": 2, "v": 2}, (0, 1, 2), 3)
    ledger.fold_base(17)
    ledger.book("adapter", {"q": 1, "v": 1}, (0,), 1, down_ranks={"q": 2, "v": 2})
    assert ledger.book("adapter", {"q": 1, "v": 1}, (0, 1), 2).base_params == 17
    assert ledger.book("adapter", {"q": 1, "v": 1}, (1,), 1).base_params == 0


def test_who_missed_a_fold_and_meets_the_next_is_charged_the_first_alone(ledger):
    ledger.book("adapter", {"q": 3, "v": 3}, (0, 1), 2)
    ledger.fold_base(17)
    ledger.book("adapter", {"q": 2, "v": 2}, (0,), 1, down_ranks={"q": 3, "v": 3})
    ledger.fold_base(10)
    bill = ledger.book("adapter", {"q": 1, "v": 2}, (0, 1), 2, down_ranks={"q": 2, "v": 2})
    assert bill.base_params == 17


def test_folds_missed_are_charged_up_to_the_whole_base(ledger):
    ledger.book("adapter", RANKS, (0,), 1)
    for _ in range(2):
        ledger.fold_base(17)
    assert 2 * 17 < BASE < 3 * 17
    assert copy_of(ledger).book("adapter", RANKS, (0,), 1).base_params == 34
    ledger.fold_base(17)
    assert ledger.book("adapter", RANKS, (0,), 1).base_params == BASE


def test_a_client_that_never_took_part_is_sent_the_whole_base_in_a_fold_round(ledger):
    ledger.fold_base(17)
    bill = ledger.book("adapter", {"q": 1, "v": 1}, (3,), 1, down_ranks={"q": 2, "v": 2})
    assert bill.base_params == BASE
    assert ledger.book("adapter", {"q": 1, "v": 1}, (3,), 1).base_params == 0


def test_the_four_reductions_are_as_counted_by_hand(ledger):
    ledger.book("full", {}, (0, 1), 2, after_initiating=False)
    ledger.replace_base()
    ledger.book("adapter", RANKS, (0, 2), 1)
    # Full: 4 messages of 47. After it: 2 down + 1 up of 33, and 2 bases of 41.
    sent, base, fedavg = 4 * 47 + 3 * 33, 2 * 41, 4 * 47 + 3 * 47
    assert ledger.totals.communication() == {
        "bytes_up": (2 * 47 + 33) * 4,
        "bytes_down": (2 * 47 + 2 * 33) * 4,
        "bytes_base": base * 4,
        "total_bytes": sent * 4,
        "fedavg_total_bytes": fedavg * 4,
        "reduction_vs_fedavg": pytest.approx(1 - sent / fedavg),
        "reduction_vs_fedavg_with_base": pytest.approx(1 - (sent + base) / fedavg),
        "reduction_vs_fedavg_after_initiating": pytest.approx(1 - 33 / 47),
        "reduction_vs_fedavg_with_base_after_initiating": pytest.approx(
            1 - (3 * 33 + 82) / (3 * 47)
        ),
    }


def test_a_reduction_without_rounds_behind_it_is_none(ledger):
    assert ledger.totals.communication()["reduction_vs_fedavg"] is None
    ledger.book("full", {}, (0,), 1, after_initiating=False)
    communication = ledger.totals.communication()
    assert communication["reduction_vs_fedavg"] == 0.0
    assert communication["reduction_vs_fedavg_after_initiating"] is None


def test_three_full_rounds_of_fifty_on_vit_b16_leave_about_6_4_percent():
    # 12 layers, query and value of 768 x 768, rank 8: 24 * 8 * 1536 = 294912 of 85.8 million.
    total = 85_800_000
    modules = {f"{i}.{m}": ModuleShape(768, 768) for i in range(12) for m in "qv"}
    ledger = Ledger(ModelShape(modules, head_params=0, total_params=total), clients=10)
    cohort, ranks = tuple(range(10)), dict.fromkeys(modules, 8)
    for _ in range(3):
        ledger.book("full", {}, cohort, 10, after_initiating=False)
    ledger.replace_base()
    for _ in range(47):
        bill = ledger.book("adapter", ranks, cohort, 10)
    assert bill.up_params == 294_912
    assert bill.up_params / total == pytest.approx(0.0034, abs=5e-5)
    # 3 / 50 + 47 / 50 * 0.0034 = 0.0632 of FedAvg's bytes: "about 6.4 %", the paper's 93.62 %.
    left = 1 - ledger.totals.communication()["reduction_vs_fedavg"]
    assert left == pytest.approx((3 + 47 * 294_912 / total) / 50, rel=1e-12)
    assert left == pytest.approx(0.064, abs=0.001)


def copy_of(ledger: Ledger) -> Ledger:
    values, held = ledger.snapshot()
    copy = Ledger(SHAPE, clients=4)
    copy.restore(values["steps"], values["totals"], held)
    return copy


# --- against a slow ledger that keeps, for each client, the set of base pieces it has -----------


@dataclass
class SlowLedger:
    """Every client holds a list of base pieces: a whole base, and folds on top, by identity."""

    pieces: list[tuple[int, int]]  # (identity, values) of what makes up the current base
    holding: dict[int, list[tuple[int, int]]]
    sums: dict[str, int]
    counter: int = 0

    def replace(self) -> None:
        self.counter += 1
        self.pieces = [(self.counter, BASE)]

    def fold(self, values: int) -> None:
        self.counter += 1
        self.pieces = [*self.pieces, (self.counter, values)]

    def needed(self, client: int, pieces: Sequence[tuple[int, int]]) -> int:
        if client not in self.holding:
            return BASE
        missing = [
            values for piece, values in pieces if (piece, values) not in self.holding[client]
        ]
        return min(sum(missing), BASE)

    def book(self, event: dict[str, Any]) -> None:
        later = event["later"]
        for position, client in enumerate(event["cohort"]):
            base = 0
            if event["kind"] == "full":
                up = down = 47
            else:
                rank, before = event["rank"], event["rank"]
                pieces = self.pieces
                if event["kind"] == "fold":
                    before, pieces = rank + 1, self.pieces[:-1]
                up, down = 17 * rank + 6, 17 * before + 6
                base = self.needed(client, pieces)
            self.holding[client] = list(self.pieces)
            arrived = position < event["arrived"]
            self.count("bytes_up", up * arrived, later)
            self.count("bytes_down", down, later)
            self.count("bytes_base", base, later)
            self.count("fedavg", 47 * (1 + arrived), later)

    def count(self, key: str, values: int, later: bool) -> None:
        self.sums[key] = self.sums.get(key, 0) + 4 * values
        if later:
            key = {"bytes_base": "later_base", "fedavg": "later_fedavg"}.get(key, "later")
            self.sums[key] = self.sums.get(key, 0) + 4 * values


EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["full", "adapter", "fold"]),
            "rank": st.integers(0, 3),
            "cohort": st.sets(st.integers(0, 3), min_size=1).map(sorted),
            "arrived": st.integers(0, 4),
            "later": st.booleans(),
        }
    ),
    max_size=12,
)


@given(events=EVENTS)
def test_the_totals_agree_with_a_slow_ledger_that_follows_each_client(events):
    ledger = Ledger(SHAPE, clients=4)
    slow = SlowLedger(pieces=[(0, BASE)], holding={}, sums={})
    for event in events:
        event["arrived"] = min(event["arrived"], len(event["cohort"]))
        ranks = dict.fromkeys(SHAPE.modules, event["rank"])
        if event["kind"] == "fold":
            slow.fold(17)
            ledger.fold_base(17)
        ledger.book(
            "full" if event["kind"] == "full" else "adapter",
            {} if event["kind"] == "full" else ranks,
            event["cohort"],
            event["arrived"],
            down_ranks=(
                dict.fromkeys(SHAPE.modules, event["rank"] + 1) if event["kind"] == "fold" else None
            ),
            after_initiating=event["later"],
        )
        slow.book(event)
        if event["kind"] == "full":
            ledger.replace_base()
            slow.replace()
    assert ledger.totals == Totals(**slow.sums)


@given(events=EVENTS, at=st.integers(0, 12))
def test_a_restored_ledger_goes_on_as_if_nothing_had_happened(events, at):
    undisturbed = Ledger(SHAPE, clients=4)
    cut = Ledger(SHAPE, clients=4)
    for index, event in enumerate(events):
        if index == at:
            values, held = cut.snapshot()
            cut = Ledger(SHAPE, clients=4)
            cut.restore(values["steps"], values["totals"], held)
        for ledger in (undisturbed, cut):
            if event["kind"] == "fold":
                ledger.fold_base(17)
            if event["kind"] == "full":
                ledger.replace_base()
            ranks = dict.fromkeys(SHAPE.modules, event["rank"])
            ledger.book("adapter", ranks, event["cohort"], len(event["cohort"]))
    assert cut.totals == undisturbed.totals
    np.testing.assert_array_equal(cut.snapshot()[1], undisturbed.snapshot()[1])
    assert cut.snapshot()[0] == undisturbed.snapshot()[0]


def test_a_snapshot_does_not_change_with_the_ledger(ledger):
    values, held = ledger.snapshot()
    ledger.fold_base(17)
    ledger.book("adapter", RANKS, (0,), 1)
    assert values["steps"] == []
    assert values["totals"]["bytes_up"] == 0
    np.testing.assert_array_equal(held, [-1, -1, -1, -1])
