"""What Ray is told before it starts."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import parameter

from rayfed_lora.launching import agent_ports
from rayfed_lora.launching.ray_session import ray_session

SWITCHED_OFF = ("RAY_USAGE_STATS_ENABLED", "RAY_SCHEDULER_EVENTS", "RAY_enable_metrics_collection")
SETTINGS = ("RAY_AUTH_MODE", *SWITCHED_OFF, "RAY_max_direct_call_object_size")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Note what Ray is started with, in place of starting it."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for name in (*SETTINGS, "RAY_ADDRESS"):
        # Set first: so that whatever is set meanwhile is taken back, too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_a_ray_of_our_own_starts_quietly_with_a_token_and_without_a_dashboard(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Importing(dict[str, Any]):
        """The modules, of which `ray` comes only when it is imported."""

        def __contains__(self, name: object) -> bool:
            return name != "ray" and super().__contains__(name)

    monkeypatch.setattr(sys, "modules", Importing(sys.modules))
    with ray_session(None):
        assert {name: os.environ[name] for name in SETTINGS} == {
            "RAY_AUTH_MODE": "token",
            **dict.fromkeys(SWITCHED_OFF, "0"),
            "RAY_max_direct_call_object_size": "524288",
        }
    assert [call["include_dashboard"] for call in started] == [False]


def test_the_agents_of_a_ray_of_our_own_are_told_their_ports(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, made = parameter.RayParams, []
    monkeypatch.setattr(ray, "init", lambda **options: made.append(parameter.RayParams()))
    with ray_session(None):
        assert parameter.RayParams is original
    ports = [
        getattr(made[0], f"{agent}_port")
        for agent in ("metrics_agent", "dashboard_agent_listen", "runtime_env_agent")
    ]
    assert len({*ports}) == 3
    # Below those that Linux gives to outgoing connections by default.
    assert all(10_000 <= port < 32_768 for port in ports)


def test_agents_choose_their_ports_where_no_free_ones_are_found(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(ray, "init", lambda **options: made.append(parameter.RayParams()))
    # Another own Ray has reserved every port.
    monkeypatch.setattr(agent_ports, "_reserved", lambda port: False)
    with ray_session(None):
        assert made[0].metrics_agent_port is None


def test_a_port_is_reserved_once() -> None:
    ports = agent_ports._free_ports(["one"])
    assert not agent_ports._reserved(ports["one"])


def test_a_ray_that_was_imported_before_decides_on_tokens_itself(
    started: list[dict[str, Any]],
) -> None:
    # Its processes would ask for a token that this one does not send.
    with ray_session(None):
        assert "RAY_AUTH_MODE" not in os.environ
        assert {os.environ[name] for name in SWITCHED_OFF} == {"0"}
    assert len(started) == 1


@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_the_token_of_a_ray_of_our_own_is_there_before_it_and_the_users_alone(
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    address: str | None,
) -> None:
    token = tmp_path / ".ray" / "auth_token"
    modes: list[int | None] = []
    monkeypatch.setattr("rayfed_lora.launching.ray_session.unreachable_cluster", lambda where: None)
    monkeypatch.setattr(
        ray,
        "init",
        lambda **options: modes.append(
            stat.S_IMODE(token.stat().st_mode) if token.exists() else None
        ),
    )
    with ray_session(address):
        pass
    # That of a cluster is not this run's.
    assert modes == [0o600 if address is None else None]
