"""The communication ledger against counts done by hand, and against a slow one of plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.federation.bills import Bill, Totals
from rayfed_lora.federation.ledger import Ledger
from rayfed_lora.federation.traffic import RoundFacts, Sent
from rayfed_lora.federation.transitions import Resizing
from rayfed_lora.types import ModelShape, ModuleShape, Trainable

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


def new_ledger(rule: str = "factor-average") -> Ledger:
    return Ledger(SHAPE, 4, RULES[rule])


@pytest.fixture
def ledger() -> Ledger:
    return new_ledger()


def book(
    ledger: Ledger,
    trainable: Trainable,
    ranks: dict[str, int],
    cohort: Sequence[int],
    arrived: int,
    **facts: Any,
) -> Bill:
    """Book a round in which the first `arrived` clients of the cohort send something."""
    mask = np.arange(len(cohort)) < arrived
    cut, folded = facts.pop("ranks_before", None), facts.pop("folded", 0)
    resizing = Resizing(ranks, cut, folded, facts.pop("resized", False))
    return ledger.book(RoundFacts(trainable, cohort, mask, resizing, **facts))


def test_a_full_round_sends_the_whole_model_both_ways_and_no_base_beside_it(ledger):
    bill = book(ledger, "full", {}, (0, 2), 2, after_initiating=False)
    assert (bill.params_up, bill.params_down, bill.base_params) == (2 * 47, 2 * 47, 0)
    assert ledger.totals.bytes_up == 2 * 47 * 4


def test_an_adapter_round_sends_factors_at_each_modules_rank_and_the_head(ledger):
    bill = book(ledger, "adapter", RANKS, (0, 1, 3), 3)
    assert bill.up.tolist() == bill.down.tolist() == 3 * [ADAPTER] == 3 * [33]
    assert (bill.params_up, bill.params_down) == (99, 99)


def test_an_adapter_of_rank_0_leaves_the_head_alone(ledger):
    bill = book(ledger, "adapter", {"q": 0, "v": 0}, (1,), 1)
    assert (bill.params_up, bill.params_down) == (6, 6)


def test_a_model_without_a_trained_head_sends_factors_alone():
    shape = ModelShape(SHAPE.modules, head_params=0, total_params=47)
    ledger = Ledger(shape, 1, RULES["factor-average"])
    assert book(ledger, "adapter", RANKS, (0,), 1).params_up == 27
    assert ledger.totals.bytes_base == 47 * 4


def test_a_client_is_sent_the_base_in_its_first_adapter_round_only(ledger):
    assert book(ledger, "adapter", RANKS, (0, 1), 2).base_params == 2 * BASE
    assert book(ledger, "adapter", RANKS, (0, 1), 2).base_params == 0
    assert book(ledger, "adapter", RANKS, (1, 2), 2).base_params == BASE


def test_a_replaced_base_is_sent_once_more_to_each_participant(ledger):
    book(ledger, "adapter", RANKS, (0, 1), 2)
    book(ledger, "full", {}, (2,), 1)
    assert book(ledger, "adapter", RANKS, (0, 1), 2).base_params == 2 * BASE
    assert book(ledger, "adapter", RANKS, (0, 1), 2).base_params == 0


def test_after_a_full_stage_every_participant_is_sent_the_new_base(ledger):
    # What a full round sends is the base before its aggregation; the aggregate is a newer one.
    book(ledger, "full", {}, (0, 1, 2, 3), 4, after_initiating=False)
    assert book(ledger, "adapter", RANKS, (0, 1), 2).base_params == 2 * BASE


def test_several_replacements_missed_cost_one_base(ledger):
    book(ledger, "adapter", RANKS, (0,), 1)
    for _ in range(2):
        book(ledger, "full", {}, (1,), 1)
    assert book(ledger, "adapter", RANKS, (0,), 1).base_params == BASE


def test_a_failed_client_is_sent_its_download_and_the_base_but_uploads_nothing(ledger):
    bill = book(ledger, "adapter", RANKS, (0, 1, 2), 1)
    assert bill.arrived == 1
    assert bill.up.tolist() == [33, 0, 0]
    assert (bill.params_up, bill.params_down) == (33, 3 * 33)
    assert bill.base_params == 3 * BASE
    # FedAvg with the same participation: 3 models down, 1 up.
    assert ledger.totals.fedavg == 4 * 47 * 4


def test_a_fold_costs_no_base_bytes_where_all_take_part_but_downloads_the_rank_before_the_cut(
    ledger,
):
    book(ledger, "adapter", {"q": 2, "v": 2}, (0, 1, 2, 3), 4)
    bill = book(
        ledger,
        "adapter",
        {"q": 1, "v": 1},
        (0, 1, 2, 3),
        4,
        ranks_before={"q": 2, "v": 2},
        folded=10 + 7,
    )
    assert bill.base_params == 0
    assert bill.up[0] == 10 + 7 + 6
    assert bill.down[0] == 2 * (10 + 7) + 6
    assert book(ledger, "adapter", {"q": 1, "v": 1}, (0, 1, 2, 3), 4).base_params == 0


def test_who_missed_a_fold_is_charged_the_folded_factors_later(ledger):
    book(ledger, "adapter", {"q": 2, "v": 2}, (0, 1, 2), 3)
    fold(ledger, (0,), {"q": 1, "v": 1})
    assert book(ledger, "adapter", {"q": 1, "v": 1}, (0, 1), 2).base_params == 17
    assert book(ledger, "adapter", {"q": 1, "v": 1}, (1,), 1).base_params == 0


def test_who_missed_a_fold_and_meets_the_next_is_charged_the_first_alone(ledger):
    book(ledger, "adapter", {"q": 3, "v": 3}, (0, 1), 2)
    fold(ledger, (0,), {"q": 2, "v": 2})
    assert fold(ledger, (0, 1), {"q": 1, "v": 2}, folded=10).base_params == 17


def test_folds_missed_are_charged_up_to_the_whole_base(ledger):
    book(ledger, "adapter", RANKS, (0,), 1)
    for _ in range(2):
        fold(ledger, (1,), RANKS)
    assert 2 * 17 < BASE < 3 * 17
    assert book(copy_of(ledger), "adapter", RANKS, (0,), 1).base_params == 34
    fold(ledger, (1,), RANKS)
    assert book(ledger, "adapter", RANKS, (0,), 1).base_params == BASE


def test_a_client_that_never_took_part_is_sent_the_whole_base_in_a_fold_round(ledger):
    assert fold(ledger, (3,), {"q": 1, "v": 1}).base_params == BASE
    assert book(ledger, "adapter", {"q": 1, "v": 1}, (3,), 1).base_params == 0


def test_the_four_reductions_are_as_counted_by_hand(ledger):
    book(ledger, "full", {}, (0, 1), 2, after_initiating=False)
    book(ledger, "adapter", RANKS, (0, 2), 1)
    # Full: 4 messages of 47. After it: 2 down + 1 up of 33, and 2 bases of 41.
    sent, base, fedavg = 4 * 47 + 3 * 33, 2 * 41, 4 * 47 + 3 * 47
    assert ledger.totals.communication() == {
        "bytes_up": (2 * 47 + 33) * 4,
        "bytes_down": (2 * 47 + 2 * 33) * 4,
        "bytes_base": base * 4,
        "total_bytes": sent * 4,
        "fedavg_total_bytes": fedavg * 4,
        "fedavg_total_bytes_same_codec": fedavg * 4,
        "reduction_vs_fedavg_same_codec": pytest.approx(1 - sent / fedavg),
        "reduction_vs_fedavg": pytest.approx(1 - sent / fedavg),
        "reduction_vs_fedavg_with_base": pytest.approx(1 - (sent + base) / fedavg),
        "reduction_vs_fedavg_after_initiating": pytest.approx(1 - 33 / 47),
        "reduction_vs_fedavg_with_base_after_initiating": pytest.approx(
            1 - (3 * 33 + 82) / (3 * 47)
        ),
    }


def test_a_reduction_without_rounds_behind_it_is_none(ledger):
    assert ledger.totals.communication()["reduction_vs_fedavg"] is None
    book(ledger, "full", {}, (0,), 1, after_initiating=False)
    communication = ledger.totals.communication()
    assert communication["reduction_vs_fedavg"] == 0.0
    assert communication["reduction_vs_fedavg_after_initiating"] is None


def test_three_full_rounds_of_fifty_on_vit_b16_leave_about_6_4_percent():
    # 12 layers, query and value of 768 x 768, rank 8: 24 * 8 * 1536 = 294912 of 85.8 million.
    total = 85_800_000
    modules = {f"{i}.{m}": ModuleShape(768, 768) for i in range(12) for m in "qv"}
    shape = ModelShape(modules, head_params=0, total_params=total)
    ledger = Ledger(shape, 10, RULES["factor-average"])
    cohort, ranks = tuple(range(10)), dict.fromkeys(modules, 8)
    for _ in range(3):
        book(ledger, "full", {}, cohort, 10, after_initiating=False)
    for _ in range(47):
        bill = book(ledger, "adapter", ranks, cohort, 10)
    assert bill.up[0] == 294_912
    assert bill.up[0] / total == pytest.approx(0.0034, abs=5e-5)
    # 3 / 50 + 47 / 50 * 0.0034 = 0.0632 of FedAvg's bytes: "about 6.4 %", the paper's 93.62 %.
    left = 1 - ledger.totals.communication()["reduction_vs_fedavg"]
    assert left == pytest.approx((3 + 47 * 294_912 / total) / 50, rel=1e-12)
    assert left == pytest.approx(0.064, abs=0.001)


def copy_of(ledger: Ledger) -> Ledger:
    copy = new_ledger()
    copy.restore(*ledger.snapshot())
    return copy


def fold(ledger: Ledger, cohort: Sequence[int], ranks: dict[str, int], folded: int = 17) -> Bill:
    """Book a round whose shrink by one rank is folded into the base."""
    before = {name: rank + 1 for name, rank in ranks.items()}
    size = len(cohort)
    return book(ledger, "adapter", ranks, cohort, size, ranks_before=before, folded=folded)


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
    ledger = new_ledger()
    slow = SlowLedger(pieces=[(0, BASE)], holding={}, sums={})
    for event in events:
        event["arrived"] = min(event["arrived"], len(event["cohort"]))
        ranks = dict.fromkeys(SHAPE.modules, event["rank"])
        folds = event["kind"] == "fold"
        if folds:
            slow.fold(17)
        book(
            ledger,
            "full" if event["kind"] == "full" else "adapter",
            {} if event["kind"] == "full" else ranks,
            event["cohort"],
            event["arrived"],
            ranks_before=dict.fromkeys(SHAPE.modules, event["rank"] + 1) if folds else None,
            folded=17 * folds,
            after_initiating=event["later"],
        )
        slow.book(event)
        if event["kind"] == "full" and event["arrived"]:
            slow.replace()
    assert ledger.totals == Totals(**slow.sums)


@given(
    events=EVENTS,
    at=st.integers(0, 12),
    rule=st.sampled_from(["factor-average", "stacking", "residual", "freeze-a", "alternate"]),
)
def test_a_restored_ledger_goes_on_as_if_nothing_had_happened(events, at, rule):
    undisturbed, cut = new_ledger(rule), new_ledger(rule)
    for index, event in enumerate(events):
        if index == at:
            snapshot = cut.snapshot()
            cut = new_ledger(rule)
            cut.restore(*snapshot)
        for ledger in (undisturbed, cut):
            full = event["kind"] == "full"
            book(
                ledger,
                "full" if full else "adapter",
                dict.fromkeys(SHAPE.modules, event["rank"]),
                event["cohort"],
                len(event["cohort"]),
                frozen=RULES[rule].frozen(index),
                resized=event["kind"] == "fold",
            )
    assert cut.totals == undisturbed.totals
    (facts, held), (expected_facts, expected_held) = cut.snapshot(), undisturbed.snapshot()
    assert facts == expected_facts
    assert held.keys() == expected_held.keys()
    for kind, versions in held.items():
        np.testing.assert_array_equal(versions, expected_held[kind])


def test_a_snapshot_does_not_change_with_the_ledger(ledger):
    facts, held = ledger.snapshot()
    fold(ledger, (0,), RANKS)
    assert facts["steps"] == []
    assert facts["totals"]["bytes_up"] == 0
    np.testing.assert_array_equal(held["base"], [-1, -1, -1, -1])


# --- what each rule sends, by hand. A of q and v has 4 and 3 values a rank, B 6 and 4; head 6 ---

ALL = (0, 1, 2, 3)
RANK_2 = {"q": 2, "v": 2}
A, B = 2 * (4 + 3), 2 * (6 + 4)


@pytest.mark.parametrize("rule", ["factor-average", "product-svd", "zero-pad", "correct"])
def test_rules_that_average_both_factors_send_both_both_ways(rule):
    bill = book(new_ledger(rule), "adapter", RANK_2, (0, 1), 2)
    assert bill.up.tolist() == bill.down.tolist() == 2 * [A + B + 6] == 2 * [40]


@pytest.mark.parametrize("rule", list(RULES))
def test_under_every_rule_a_full_round_sends_the_whole_model(rule):
    bill = book(new_ledger(rule), "full", {}, (0, 1), 2)
    assert (bill.params_up, bill.params_down, bill.base_params) == (94, 94, 0)


def test_freeze_a_sends_b_and_the_head():
    bill = book(new_ledger("freeze-a"), "adapter", RANK_2, (0, 1), 2, frozen="a")
    assert bill.up.tolist() == bill.down.tolist() == 2 * [B + 6] == 2 * [26]
    # A is drawn from the seed that all share.
    assert bill.base_params == 2 * BASE


def test_freeze_a_sends_a_new_a_once_to_each_participant_after_a_cut():
    ledger = new_ledger("freeze-a")
    book(ledger, "adapter", RANK_2, ALL, 4, frozen="a")
    one = {"q": 1, "v": 1}
    assert book(ledger, "adapter", one, (0, 1), 2, frozen="a", resized=True).base_params == 2 * 7
    assert book(ledger, "adapter", one, (0, 2), 2, frozen="a").base_params == 7
    assert book(ledger, "adapter", one, ALL, 4, frozen="a").base_params == 7


def test_alternate_sends_the_live_factor_both_ways():
    ledger = new_ledger("alternate")
    first = book(ledger, "adapter", RANK_2, ALL, 4, frozen="a")
    second = book(ledger, "adapter", RANK_2, ALL, 4, frozen="b")
    assert first.up.tolist() == first.down.tolist() == 4 * [B + 6]
    assert second.up.tolist() == second.down.tolist() == 4 * [A + 6]
    # Who took part has got the result: nothing else is needed.
    assert (first.base_params, second.base_params) == (4 * BASE, 0)


def test_alternate_brings_who_missed_a_turn_up_to_date():
    ledger = new_ledger("alternate")
    book(ledger, "adapter", RANK_2, (0, 1, 2), 3, frozen="a")
    book(ledger, "adapter", RANK_2, (0, 1), 2, frozen="b")
    # Client 2 missed the turn of A, client 3 both; B is live. Both lack the head.
    bill = book(ledger, "adapter", RANK_2, ALL, 4, frozen="a")
    assert bill.base.tolist() == [0, 0, A + 6, BASE + A + B + 6]


@pytest.mark.parametrize(("rule", "frozen"), [("alternate", "b"), ("residual", None)])
def test_who_holds_both_factors_cuts_them_and_others_are_sent_the_new_ones(rule, frozen):
    ledger, one = new_ledger(rule), {"q": 1, "v": 1}
    # One client, so that `residual` leaves nothing to merge.
    book(ledger, "adapter", RANK_2, (0,), 1, frozen=RULES[rule].frozen(0))
    bill = book(ledger, "adapter", one, (0, 1), 1, frozen=frozen, resized=True)
    assert bill.base.tolist() == [0, BASE + 7 + 10 + 6]
    # The cut leaves the head as it was: who missed two rounds is sent its newest.
    assert book(ledger, "adapter", one, (2,), 1).base.tolist() == [BASE + 7 + 10 + 6]


@pytest.mark.parametrize(
    ("rule", "residual", "missing"),
    [
        ("freeze-a", 0, [0, 0, 7, BASE + 7]),
        ("freeze-a", 17, [0, 0, 17 + 7, BASE + 7]),
        # Client 2 cuts both itself, but A was live in the round that it missed, and the head.
        ("alternate", 0, [0, 0, 7 + 6, BASE + 10 + 7 + 6]),
        ("alternate", 17, [0, 0, 17 + 7 + 6, BASE + 10 + 7 + 6]),
    ],
)
def test_who_missed_a_cut_is_sent_the_factors_that_it_made(rule, residual, missing):
    ledger, one = new_ledger(rule), {"q": 1, "v": 1}
    book(ledger, "adapter", RANK_2, (0, 1, 2), 3, frozen="a")
    fold = {"ranks_before": RANK_2, "folded": residual} if residual else {}
    book(ledger, "adapter", one, (0, 1), 2, frozen=RULES[rule].frozen(1), resized=True, **fold)
    after = book(ledger, "adapter", one, ALL, 4, frozen=RULES[rule].frozen(2))
    assert after.base.tolist() == missing


def test_share_a_sends_a_and_the_head():
    bill = book(new_ledger("share-a"), "adapter", RANK_2, (0, 1), 2)
    assert bill.up.tolist() == bill.down.tolist() == 2 * [A + 6] == 2 * [20]


def test_stacking_sends_the_factors_of_all_that_arrived_to_all():
    ledger = new_ledger("stacking")
    bill = book(ledger, "adapter", RANK_2, (0, 1, 2), 2)
    assert bill.up.tolist() == [40, 40, 0]
    assert bill.down.tolist() == 3 * [2 * (A + B) + 6]
    assert bill.base_params == 3 * BASE
    # Those three have merged it; the fourth gets the base and the head as they are.
    assert book(ledger, "adapter", RANK_2, ALL, 4).base.tolist() == [0, 0, 0, BASE + 6]


def test_who_missed_a_stack_is_charged_it_up_to_the_whole_base():
    ledger = new_ledger("stacking")
    book(ledger, "adapter", {"q": 1, "v": 0}, ALL, 4)
    book(ledger, "adapter", {"q": 1, "v": 0}, (0, 1), 2)
    assert book(ledger, "adapter", {"q": 1, "v": 0}, ALL, 4).base.tolist() == [0, 0, 20 + 6, 20 + 6]
    for _ in range(2):
        book(ledger, "adapter", RANK_2, (0, 1), 2)
    assert book(ledger, "adapter", RANK_2, (2,), 1).base.tolist() == [BASE + 6]


@pytest.mark.parametrize("rule", ["stacking", "residual", "alternate"])
def test_where_the_download_is_the_result_a_head_trained_in_full_rounds_is_sent_before(rule):
    ledger = new_ledger(rule)
    frozen = {"frozen": "a"} if rule == "alternate" else {}
    book(ledger, "full", {}, (0, 1), 2)
    assert book(ledger, "adapter", RANK_2, (0, 1), 2, **frozen).base.tolist() == 2 * [BASE + 6]
    assert book(ledger, "adapter", RANK_2, (0, 1), 2, **frozen).base.tolist() == [0, 0]


def test_residual_sends_beside_the_averages_what_they_lack_or_the_matrix():
    ledger = new_ledger("residual")
    ranks = {"q": 1, "v": 1}
    # Two clients: rank 1 is lacking, 10 and 7 values; three: rank 2, 20 and 14, but a 4 x 3
    # matrix has 12; one client: nothing.
    for cohort, lacking in (((0, 1), 17), ((0, 1, 2), 20 + 12), ((0,), 0)):
        bill = book(ledger, "adapter", ranks, cohort, len(cohort))
        assert bill.up.tolist() == len(cohort) * [17 + 6]
        assert bill.down.tolist() == len(cohort) * [17 + 6 + lacking]
    # A server's lr other than 1 leaves the start's part in what is lacking: one rank more.
    alone = RoundFacts("adapter", (0,), np.ones(1, bool), Resizing(ranks), stepped=True)
    assert new_ledger("residual").book(alone).down.tolist() == [17 + 6 + 17]
    # Who missed the newest averages and head is sent them to start from; client 3 holds nothing.
    assert book(ledger, "adapter", ranks, ALL, 4).base.tolist() == [0, 23, 23, BASE + 23]
    book(ledger, "adapter", ranks, (0, 1), 2)
    # The averages and the head, and the rest of rank 1 that went into the base.
    assert book(ledger, "adapter", ranks, (2,), 1).base.tolist() == [17 + 6 + 17]


def test_a_folded_cut_needs_no_new_frozen_factor():
    ledger = new_ledger("freeze-a")
    book(ledger, "adapter", RANK_2, ALL, 4, frozen="a")
    facts = {"frozen": "a", "resized": True, "ranks_before": RANK_2, "folded": 17}
    assert book(ledger, "adapter", {"q": 1, "v": 1}, ALL, 4, **facts).base_params == 0


def test_who_lacks_a_frozen_factor_is_sent_it_from_before_a_folded_cut():
    ledger = new_ledger("freeze-a")
    book(ledger, "adapter", RANK_2, (0, 1), 2, frozen="a")
    book(ledger, "adapter", {"q": 1, "v": 1}, (0, 1), 2, frozen="a", resized=True)
    # Client 2 lacks the A of rank 1 that the cut to v's rank 0 starts from.
    facts = {"frozen": "a", "resized": True, "ranks_before": {"q": 1, "v": 1}, "folded": 7}
    assert book(ledger, "adapter", {"q": 1, "v": 0}, (0, 2), 2, **facts).base.tolist() == [
        0,
        BASE + 7,
    ]


def test_where_the_download_is_the_result_a_folded_cut_makes_it_no_larger():
    one, facts = {"q": 1, "v": 1}, {"ranks_before": RANK_2, "folded": 17}
    ledger = new_ledger("alternate")
    book(ledger, "adapter", RANK_2, (0, 1), 2, frozen="a")
    bill = book(ledger, "adapter", one, (0, 2), 2, frozen="b", resized=True, **facts)
    assert bill.up.tolist() == bill.down.tolist() == 2 * [7 + 6]
    # Client 2 starts from the head and from B as it was before the cut; A is still the seed's.
    assert bill.base.tolist() == [0, BASE + B + 6]
    ledger = new_ledger("residual")
    book(ledger, "adapter", RANK_2, (0, 1), 2)
    bill = book(ledger, "adapter", one, (0, 2), 2, resized=True, **facts)
    assert bill.down.tolist() == 2 * [17 + 6 + 17]
    assert bill.base.tolist() == [0, BASE + A + B + 6]


@pytest.mark.parametrize("rule", ["product-svd", "zero-pad"])
def test_clients_of_different_ranks_send_and_get_their_own(rule):
    bill = book(new_ledger(rule), "adapter", {"q": 2, "v": 1}, (0, 1), 2, limits=np.array([1, 5]))
    assert bill.up.tolist() == bill.down.tolist() == [10 + 7 + 6, 20 + 7 + 6]


def test_stacking_sends_the_sum_of_different_ranks():
    bill = book(new_ledger("stacking"), "adapter", RANK_2, (0, 1), 2, limits=np.array([1, 2]))
    assert bill.up.tolist() == [17 + 6, 34 + 6]
    assert bill.down.tolist() == 2 * [17 + 34 + 6]


def test_of_who_left_the_sent_part_is_booked_and_the_rest_of_the_base_comes_later(ledger):
    sent = Sent(
        absent=np.array([False, True, True]),
        down=np.array([1.0, 0.5, 1.0]),
        up=np.array([1.0, 0.0, 0.25]),
    )
    facts = RoundFacts(
        "adapter", (0, 1, 2), np.array([True, False, False]), Resizing(RANKS), sent=sent
    )
    bill = ledger.book(facts)
    # Half of 33 and of 41 values, and a quarter of 33, each rounded down.
    assert bill.up.tolist() == [33, 0, 8]
    assert bill.down.tolist() == [33, 16, 33]
    assert bill.base.tolist() == [41, 20, 41]
    assert bill.arrived == 1
    # Client 1 has not got the base whole; client 2 has, though it left.
    assert book(ledger, "adapter", RANKS, (0, 1, 2), 3).base.tolist() == [0, 41, 0]


def test_who_left_before_a_rounds_result_is_sent_it_later():
    ledger = new_ledger("stacking")
    sent = Sent(np.array([False, True]), np.array([1.0, 1.0]), np.array([1.0, 0.5]))
    facts = RoundFacts("adapter", (0, 1), np.array([True, False]), Resizing(RANKS), sent=sent)
    bill = ledger.book(facts)
    # The result was one client's factors, 27 values, and the head; client 1 got only the base.
    assert (bill.down.tolist(), bill.base.tolist()) == ([27 + 6, 0], [41, 41])
    assert book(ledger, "adapter", RANKS, (0, 1), 2).base.tolist() == [0, 27 + 6]


@pytest.mark.parametrize("rounds_before", [0, 1, 2])
def test_a_quote_is_the_bill_and_books_nothing(ledger, rounds_before):
    facts = RoundFacts("adapter", (0, 1), np.ones(2, bool), Resizing(RANKS, folded_params=7))
    earlier = [
        RoundFacts("adapter", (t, 2), np.ones(2, bool), Resizing(RANKS, folded_params=3))
        for t in range(rounds_before)
    ]
    for each in earlier:
        ledger.book(each)
    before = ledger.snapshot()
    quote = ledger.quote(facts)
    facts_before, held_before = before
    facts_now, held_now = ledger.snapshot()
    assert facts_now == facts_before
    assert all((held_now[kind] == held).all() for kind, held in held_before.items())
    bill = ledger.book(facts)
    for kind in ("up", "down", "base"):
        assert (getattr(quote, kind) == getattr(bill, kind)).all()


def test_fedavg_saves_nothing_against_itself_whoever_leaves(ledger):
    sent = Sent(np.array([False, True]), np.array([1.0, 0.3]), np.array([1.0, 0.0]))
    facts = RoundFacts("full", (0, 1), np.array([True, False]), sent=sent)
    ledger.book(facts)
    assert ledger.totals.communication()["reduction_vs_fedavg"] == 0.0


def test_who_missed_a_rounds_result_holds_no_renewed_factors():
    ledger = new_ledger("alternate")
    sent = Sent(np.array([False, True]), np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    arrived = np.array([True, False])
    ledger.book(RoundFacts("adapter", (0, 1), arrived, Resizing(RANKS), frozen="a", sent=sent))
    # B of q, 6 values at rank 2, of v, 4 at rank 1, and the head of 6, which went to client 0 only.
    later = book(ledger, "adapter", RANKS, (0, 1), 2, frozen="b")
    assert later.base.tolist() == [0, 6 * 2 + 4 + 6]


def test_a_full_round_in_which_nobody_arrives_leaves_no_new_base(ledger):
    book(ledger, "full", {}, (0, 1), 2)
    book(ledger, "full", {}, (0,), 0)
    # Client 0 was sent the result of the first round; client 1 has only helped to make it.
    assert book(ledger, "adapter", RANKS, (0, 1), 2).base.tolist() == [0, BASE]


@pytest.mark.parametrize("rule", ["stacking", "residual", "alternate"])
def test_a_round_in_which_nobody_arrives_renews_nothing(rule):
    ledger = new_ledger(rule)
    book(ledger, "adapter", RANKS, (0, 1), 2, frozen=RULES[rule].frozen(0))
    book(ledger, "adapter", RANKS, (0,), 0, frozen=RULES[rule].frozen(1))
    assert book(ledger, "adapter", RANKS, (0, 1), 2, frozen=RULES[rule].frozen(1)).base_params == 0


def test_a_base_in_two_bytes_is_billed_so_until_full_rounds_leave_one_in_float32():
    """BASE values, all but one of them in two bytes; the merge of 6 + 4 values is float32."""
    stored = 2 * (BASE - 1) + 4
    ledger = Ledger(replace(SHAPE, stored_base_bytes=stored), 4, RULES["factor-average"])
    bill = book(ledger, "adapter", RANKS, (0, 1), 2)
    assert bill.base.tolist() == [BASE, BASE]
    assert bill.sent_base.tolist() == [stored, stored]
    assert ledger.totals.bytes_base == 2 * stored
    folded = book(ledger, "adapter", RANKS, (0, 2), 2, ranks_before=RANKS, folded=10)
    again = book(ledger, "adapter", RANKS, (1,), 1)
    # Client 2 gets the whole base; client 1 what it missed.
    assert folded.sent_base.tolist()[1] == stored
    assert again.sent_base.tolist() == [10 * 4]
    kept, held = ledger.snapshot()
    book(ledger, "full", {}, (3,), 1)
    assert book(ledger, "adapter", RANKS, (1,), 1).sent_base.tolist() == [BASE * 4]
    ledger.restore(kept, held)
    assert book(ledger, "adapter", RANKS, (3,), 1).sent_base.tolist() == [stored]
