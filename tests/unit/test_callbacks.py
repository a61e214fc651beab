"""Callbacks see each finished round, and may end the run."""

from __future__ import annotations

import pytest

import rayfed_lora
from rayfed_lora.errors import RunError
from rayfed_lora.plugins import FinishedRound
from tests.fakes import FakeFactory, make_recipe


def test_a_callback_sees_the_record_the_bill_and_the_model_of_each_round(tmp_path):
    seen: list[FinishedRound] = []
    run = rayfed_lora.run(
        make_recipe(), str(tmp_path), factory=FakeFactory(), callbacks=[seen.append]
    )
    assert [each.record.round for each in seen] == run.rounds["round"].tolist()
    assert [each.bill.params_up * 4 for each in seen] == run.rounds["bytes_up"].tolist()
    assert all(len(each.clients) == each.record.clients for each in seen)
    assert seen[-1].model.trainable == "adapter" and seen[-1].model.state.factors
    assert "stopped_by" not in run.summary


def test_a_true_return_ends_the_run_which_exports_and_is_finished(tmp_path):
    def two_rounds(done: FinishedRound) -> bool:
        return done.record.round == 1

    run = rayfed_lora.run(
        make_recipe(), str(tmp_path), factory=FakeFactory(), callbacks=[two_rounds]
    )
    assert len(run.rounds) == run.summary["rounds"] == 2
    assert run.summary["stopped_by"] == "two_rounds"
    again = rayfed_lora.run(make_recipe(), str(tmp_path), factory=FakeFactory(), resume=True)
    assert again.summary["adapter_sha256"] == run.summary["adapter_sha256"]


def test_a_run_ends_with_a_tested_round(tmp_path):
    run = rayfed_lora.run(
        make_recipe(evaluation__every=3),
        str(tmp_path),
        factory=FakeFactory(),
        callbacks=[lambda done: True],
    )
    assert len(run.rounds) == 3
    assert run.rounds["eval_accuracy"].notna().tolist() == [False, False, True]


def test_a_callback_that_raises_ends_the_run_by_name_and_the_rounds_are_kept(tmp_path):
    def broken(done: FinishedRound) -> None:
        if done.record.round == 1:
            raise ValueError("no")

    with pytest.raises(RunError, match=r"callback 'broken' failed after round 2"):
        rayfed_lora.run(make_recipe(), str(tmp_path), factory=FakeFactory(), callbacks=[broken])
    run = rayfed_lora.run(make_recipe(), str(tmp_path), factory=FakeFactory(), resume=True)
    assert run.summary["rounds"] == len(run.rounds)
