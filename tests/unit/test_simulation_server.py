"""The driver actor as a plain class, on a local executor in place of Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rayfed_lora.errors import InterruptedRunError
from rayfed_lora.launching import simulation_server
from rayfed_lora.launching.simulation_server import SimulationServer
from rayfed_lora.recipe.recipe import Recipe
from tests.fakes import Behaviour, FakeFactory, every_round, local_engine, make_recipe


class FakeRay:
    """The actor's context, and the actors that were killed."""

    def __init__(self) -> None:
        self.restarted = False
        self.started: list[tuple[str, bool]] = []
        self.killed = threading.Event()

    def context(self) -> Any:
        return SimpleNamespace(
            get_actor_id=lambda: "actor-1",
            was_current_actor_reconstructed=self.restarted,
            current_actor="itself",
        )

    def executor(
        self,
        recipe: Recipe,
        factory: FakeFactory,
        note: Any,
        run_id: str,
        *,
        again: bool,
        step: Any,
    ) -> Any:
        del step
        self.started.append((run_id, again))
        executor: Any = local_engine(recipe, factory.behaviour)
        executor.usage = lambda: pytest.fail("no metrics are collected")
        return executor

    def kill(self, actor: str) -> None:
        assert actor == "itself"
        self.killed.set()


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setenv("RAY_enable_metrics_collection", "0")
    monkeypatch.setattr(ray, "get_runtime_context", fake.context)
    monkeypatch.setattr(ray, "kill", fake.kill)
    monkeypatch.setattr(simulation_server, "RayEngine", fake.executor)
    monkeypatch.setattr(simulation_server, "_LINGER_S", 0.0)
    return fake


def server_of(
    out: Path, behaviour: Behaviour | None = None, *, detached: bool = False
) -> SimulationServer:
    factory = FakeFactory(behaviour or Behaviour())
    return SimulationServer(make_recipe(), str(out), factory=factory, detached=detached)


def stopped(server: SimulationServer, rounds: int) -> None:
    """Run a server that is stopped once so many rounds are done."""
    board = server._board
    done = board.round_done

    def round_done(*given: Any) -> None:
        done(*given)
        if board.status().rounds_done == rounds:
            server.stop()

    board.round_done = round_done  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError, match=f"stopped with {rounds} of 6 rounds done"):
        server.run()


def test_a_server_runs_its_request_and_has_its_status(fake_ray, tmp_path):
    server = server_of(tmp_path)
    assert (repr(server), server.status().phase) == ("server of fake", "starting")
    assert server.run()["rounds"] == 6
    status = server.status(records_seen=4)
    assert (status.phase, [record.round for record in status.records]) == ("done", [4, 5])
    assert fake_ray.started == [("actor-1", False)]


def test_a_server_that_ray_has_restarted_resumes_though_its_request_is_a_new_run(
    fake_ray, tmp_path
):
    stopped(server_of(tmp_path), rounds=2)
    fake_ray.restarted = True
    server = server_of(tmp_path)
    assert server.run()["rounds"] == 6
    assert server.status().rounds_before == 2
    assert fake_ray.started == [("actor-1", False), ("actor-1", True)]


def test_a_detached_server_starts_at_once_and_ends_itself(fake_ray, tmp_path):
    server = server_of(tmp_path, detached=True)
    assert fake_ray.killed.wait(60)
    assert server.status().phase == "done"


def test_a_detached_server_reports_a_failure_in_its_status(fake_ray, tmp_path, capsys):
    failing = Behaviour(failing=every_round(*range(6)))
    server = server_of(tmp_path, failing, detached=True)
    assert fake_ray.killed.wait(60)
    status = server.status()
    assert (status.phase, status.over) == ("failed", True)
    assert "none of 3 clients sent a usable update" in status.notes[-1]
    assert status.notes[-1] in capsys.readouterr().err


def test_a_detached_server_reports_that_it_was_stopped(fake_ray, tmp_path):
    slow = Behaviour(sleep_s=dict.fromkeys(range(6), 0.1))
    server = server_of(tmp_path, slow, detached=True)
    server.stop()
    assert fake_ray.killed.wait(60)
    assert server.status().phase == "stopped"
    assert "of 6 rounds done" in server.status().notes[-1]
