"""What a run tells of itself when it is the command of a Ray job, and where such a run is kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from rayfed_lora.errors import BadInputError
from rayfed_lora.jobs import reporting as module
from rayfed_lora.jobs.reporting import reporting
from rayfed_lora.launching import launch
from rayfed_lora.launching.compare import compare
from rayfed_lora.launching.this_process import interruptible
from rayfed_lora.runs.location import job_id, run_location
from rayfed_lora.runs.status import Status
from tests.fakes import make_recipe

KEY = "_ray_internal_job_info_job-1"


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the command of job-1."""
    config = json.dumps({"metadata": {"job_submission_id": "job-1"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ray's records, by key."""
    from ray.experimental import internal_kv

    kept: dict[str, Any] = {KEY: {"status": "RUNNING", "metadata": {"mine": "1"}, "message": "x"}}

    def get(key: str, *, namespace: str) -> bytes | None:
        assert namespace == "job"
        return json.dumps(kept[key]).encode() if key in kept else None

    def put(key: str, value: str, *, overwrite: bool, namespace: str) -> None:
        assert overwrite
        assert namespace == "job"
        kept[key] = json.loads(value)

    monkeypatch.setattr(internal_kv, "_internal_kv_get", get)
    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    return kept


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"metadata": {"job_submission_id": 1}}'])
def test_a_process_that_is_no_jobs_command_is_none(
    text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if text is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
    assert job_id() is None
    seen: list[Status] = []
    with reporting(make_recipe(), "/out", seen.append) as tell:
        tell(Status())
    assert seen == [Status()]


@pytest.mark.usefixtures("in_job")
def test_a_job_tells_in_its_own_record_where_it_stands(records: dict[str, Any]) -> None:
    seen: list[Status] = []
    first = Status(phase="training", rounds=6, running=1, stage="heating", rank=3)
    last = Status(phase="done", rounds_done=6, rounds=6, loss=0.5)
    with reporting(make_recipe(), "/out", seen.append) as tell:
        tell(first)
        assert records[KEY]["message"] == "round 1/6 heating rank 3, ETA -:--"
        # Within two seconds of the first: told at the end.
        tell(last)
        assert records[KEY]["metadata"]["progress"] == "round 1/6 heating rank 3, ETA -:--"
    metadata = records[KEY]["metadata"]
    assert metadata["progress"] == "done, train loss 0.500"
    assert json.loads(metadata["rayfed_lora.progress"])["rounds_done"] == 6
    assert (metadata["recipe"], metadata["run folder"], metadata["mine"]) == ("fake", "/out", "1")
    assert "name: fake" in metadata["rayfed_lora.recipe"]
    assert records[KEY]["status"] == "RUNNING"
    assert seen == [first, last]


@pytest.mark.usefixtures("in_job")
@pytest.mark.parametrize("record", [None, [], {"status": "STOPPED"}])
def test_a_record_that_is_another_is_left_alone(record: Any, records: dict[str, Any]) -> None:
    records[KEY] = record
    with reporting(make_recipe(), "/out", lambda status: None) as tell:
        tell(Status())
    assert records[KEY] == record


@pytest.mark.usefixtures("in_job", "records")
def test_a_run_that_cannot_tell_of_itself_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise RaySystemError("no GCS")

    monkeypatch.setattr(module, "_update_record", fail)
    seen: list[Status] = []
    with reporting(make_recipe(), "/out", seen.append) as tell:
        tell(Status())
    assert seen == [Status()]


@pytest.mark.usefixtures("in_job")
def test_a_run_in_a_job_is_kept_where_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert run_location(None, "fake").startswith("/home/ada/rayfed-lora-runs/fake-")
    assert run_location("~/a", "fake") == "/home/ada/a"
    assert run_location("s3://bucket/a", "fake") == "s3://bucket/a"
    assert run_location("/shared/a", "fake") == "/shared/a"
    refusal = "'runs/a': expected an absolute path"
    with pytest.raises(BadInputError, match=refusal):
        run_location("runs/a", "fake")
    with pytest.raises(BadInputError, match=refusal):
        launch.run(make_recipe(storage__path="runs/a"))
    with pytest.raises(BadInputError, match=refusal):
        compare("digits-vit", ["fedavg"], "runs/a")


def test_a_run_elsewhere_is_kept_under_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert run_location(None, "fake").startswith("runs/fake-")
    assert run_location("a", "fake") == "a"
    assert run_location("~/a", "fake") == str(Path.home() / "a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_cleanly_and_the_second_one_at_once(number: int) -> None:
    before = signal.getsignal(number)
    stopped: list[bool] = []
    with interruptible(lambda: stopped.append(True)):
        os.kill(os.getpid(), number)
        assert stopped == [True]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
