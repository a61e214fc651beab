"""The commands about a cluster, with a fake of Ray's client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.cli import commands as cli
from rayfed_lora.diagnosis.findings import Finding
from tests.fake_jobs import FakeClient

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    found = FakeClient(tail=["round 1\n"])

    def client_of(address: str | None) -> FakeClient:
        assert address == "http://head:8265"
        return found

    monkeypatch.setattr("rayfed_lora.jobs.jobs.client_of", client_of)
    return found


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["rayfed-lora", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


AT = ("--address", "http://head:8265")


def test_a_job_is_submitted_looked_at_stopped_and_gone_on_with(
    command: Command, client: FakeClient
) -> None:
    status, out, _ = command(
        "submit", "digits-vit", "--set", "seed=3", "clients.per_round=4", "--out", "/out", *AT
    )
    assert status == 0
    (job,) = client.jobs
    assert f"job: {job}" in out
    assert "seed: 3" in client.sent[0]["files"]["recipe.yaml"]
    assert "per_round: 4" in client.sent[0]["files"]["recipe.yaml"]
    status, out, _ = command("status", job, *AT)
    assert (status, "state       pending" in out) == (0, True)
    assert job in command("status", *AT)[1]
    assert command("logs", job, *AT)[1] == "round 1\n"
    status, out, _ = command("stop", job, *AT)
    assert (status, f"job {job} stopped" in out) == (0, True)
    status, out, _ = command("resume", job, *AT)
    assert (status, len(client.jobs)) == (0, 2)


def test_following_ends_with_the_status_of_the_run(command: Command, client: FakeClient) -> None:
    status, out, _ = command("submit", "digits-vit", "--out", "/out", "--follow", *AT)
    assert (status, "round 1\n" in out) == (0, True)
    (job,) = client.jobs
    client.jobs[job].status = "FAILED"
    client.jobs[job].driver_exit_code = 2

    async def silent(job: str) -> Any:
        for text in ():
            yield text

    client.tail_job_logs = silent  # type: ignore[method-assign, assignment]
    assert command("logs", job, "--follow", *AT)[0] == 2


def test_faults_of_a_recipe_come_before_anything_is_asked_of_the_cluster(
    command: Command, client: FakeClient
) -> None:
    status, out, err = command("submit", "digits-vit", "--set", "seeed=3", *AT)
    assert (status, out, client.sent) == (2, "", [])
    assert "did you mean 'seed'" in err
    status, _, err = command("submit", "digits-vit", "--out", "runs/a", *AT)
    assert (status, client.sent) == (2, [])
    assert "expected an absolute path" in err


def test_a_doctor_at_a_dashboard_is_a_job(command: Command, client: FakeClient) -> None:
    options = ("--recipe", "digits-vit", "--recipe", "trec-minilm", "--storage", "s3://a b;c")
    status, out, _ = command("doctor", *options, "--probe", *AT)
    assert (status, "round 1\n" in out) == (0, True)
    (sent,) = client.sent
    assert sent["entrypoint"] == (
        "rayfed-lora doctor --recipe=recipe-0.yaml --recipe=recipe-1.yaml"
        " '--storage=s3://a b;c' --probe"
    )
    assert sorted(sent["files"]) == ["recipe-0.yaml", "recipe-1.yaml"]
    assert "name: trec-minilm" in sent["files"]["recipe-1.yaml"]
    status, _, err = command("doctor", "--storage", "runs", *AT)
    assert (status, len(client.sent)) == (2, 1)
    assert "'runs': expected an absolute path" in err


@pytest.mark.parametrize(("level", "status"), [("fault", 1), ("warning", 0)])
def test_a_doctor_here_ends_with_1_if_there_is_a_fault(
    level: Any, status: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doctor(address: Any, recipes: Any, *, storage: Any, probe: bool) -> list[Finding]:
        assert (address, [each.name for each in recipes]) == (None, ["digits-vit"])
        return [Finding(level, "ports", "closed", "open them")]

    monkeypatch.setattr("rayfed_lora.diagnosis.doctor.doctor", doctor)
    found = command("doctor", "--recipe", "digits-vit")
    assert found[0] == status
    assert f"{level:<8}ports: closed" in found[1]
    assert "fix: open them" in found[1]
