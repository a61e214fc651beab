"""A Ray that has ended is noticed by its processes on this machine, or by its control store."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import worker

from rayfed_lora.launching import ray_health
from rayfed_lora.launching.ray_health import RayHealth
from rayfed_lora.launching.ray_session import RayLostError


class FakeNode:
    def __init__(self) -> None:
        self.dead: list[tuple[str, Any]] = []

    def dead_processes(self) -> list[tuple[str, Any]]:
        return self.dead


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    fake = FakeNode()
    monkeypatch.setattr(worker, "_global_node", fake)
    monkeypatch.setattr(ray_health, "_LOOK_S", 0.0)
    return fake


def health(monkeypatch: pytest.MonkeyPatch, gcs: str) -> RayHealth:
    context = SimpleNamespace(gcs_address=gcs)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    return RayHealth("run it again")


def test_a_control_store_that_is_gone_is_noticed_at_the_third_look(node, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        looks = health(monkeypatch, f"127.0.0.1:{port}")
        for _ in range(5):
            looks.check()
    for _ in range(2):
        looks.check()
    with pytest.raises(RayLostError, match=rf"127.0.0.1:{port} does not answer.*: run it again$"):
        looks.check()


@pytest.mark.parametrize("kind", ["raylet", "gcs_server"])
def test_a_process_of_an_own_ray_that_has_ended_is_noticed_at_once(node, monkeypatch, kind):
    looks = health(monkeypatch, "127.0.0.1:1")
    node.dead = [("log_monitor", None)]
    looks.check()
    node.dead = [("log_monitor", None), (kind, None)]
    with pytest.raises(RayLostError, match=f"its {kind} on this machine ended"):
        looks.check()
