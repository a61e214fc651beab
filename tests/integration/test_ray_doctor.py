"""A doctor's questions on a local Ray of one node."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed_lora.diagnosis import doctor, node_report
from tests import ailing
from tests.fakes import make_recipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_a_healthy_machine_has_no_fault_and_a_folder_that_was_not_there_is_not_there_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(
        data__source="digits",
        model__config={"hidden_size": 16, "num_attention_heads": 2, "patch_size": 4},
        storage__path="runs/a",
    )
    found = doctor.doctor(None, [recipe], probe=True)
    by_subject = {each.subject: each for each in found}
    assert [each for each in found if each.level == "fault"] == []
    assert by_subject["nodes"].text == "1 of 1 answered"
    assert by_subject["versions"].level == "ok"
    assert by_subject[f"storage {tmp_path / 'runs' / 'a'}"].level == "ok"
    assert list(tmp_path.iterdir()) == []
    # Two logical GPUs and no card.
    (gpus,) = [each for each in found if each.subject.startswith("GPUs of ")]
    assert gpus.level in ("ok", "warning")
    assert by_subject["recipe fake"].text.startswith("1 client actors of 1 CPU fit")
    assert by_subject["GPU memory of fake"].level == "skipped"


def test_a_folder_that_cannot_be_written_and_one_that_is_not_shared_are_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from rayfed_lora.diagnosis import node_checks

    nodes = ray.nodes()
    (tmp_path / "file").touch()
    (found,) = node_checks.check_storage(str(tmp_path / "file" / "runs"), nodes)
    assert (found.level, "cannot write" in found.text) == ("fault", True)
    (odd,) = node_checks.check_storage("nosuch://bucket", nodes)
    assert (odd.level, "nosuch" in odd.text) == ("fault", True)
    monkeypatch.setattr(node_checks, "_unseen", ailing.sees_nothing)
    (found,) = node_checks.check_storage(str(tmp_path), nodes)
    assert "does not see files that other nodes wrote there" in found.text
    assert "s3://bucket/runs" in found.fix
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_question_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    import ray

    from rayfed_lora.diagnosis.node_checks import Unanswered, answers, on_node

    mark, node = tmp_path / "awake", ray.nodes()[0]["NodeID"]
    asked = on_node(node, ailing.marks_late, str(mark), 6.0)
    (answer,) = answers([asked], timeout_s=3.0)
    assert isinstance(answer, Unanswered)
    assert str(answer) == "no answer in time"
    with pytest.raises(ray.exceptions.RayError):
        ray.get(asked, timeout=20.0)
    assert not mark.exists()


def test_a_node_that_is_gone_or_lacks_a_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from rayfed_lora.diagnosis import node_checks

    (node,) = ray.nodes()
    gone = {**node, "NodeID": "0" * 56}
    here, there = node_checks.reports([node, gone])
    assert here.error == ""
    assert there.error != ""
    unreached = node_checks.check_network([node, gone])
    assert {each.level for each in unreached} == {"fault"}
    assert "open all TCP ports" in unreached[0].fix
    monkeypatch.setattr(node_report, "inspect", ailing.fails)
    (failed,) = node_checks.reports([node])
    assert failed.error == "ModuleNotFoundError: No module named 'peft'"
