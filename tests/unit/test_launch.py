"""What Ray is told before it starts."""

from __future__ import annotations

import os
import re
import stat
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import parameter

from rayfed_lora.errors import InterruptedRunError, ResourceError, RunError
from rayfed_lora.launching import agent_ports
from rayfed_lora.launching.ray_session import ray_session

SWITCHED_OFF = ("RAY_USAGE_STATS_ENABLED", "RAY_SCHEDULER_EVENTS", "RAY_enable_metrics_collection")
# What Ray returns once it has started; nothing can be made in that folder.
CONTEXT = SimpleNamespace(address_info={"session_dir": "/proc/self/nothing/session_x_1"})
SETTINGS = ("RAY_AUTH_MODE", *SWITCHED_OFF, "RAY_max_direct_call_object_size")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Note what Ray is started with, in place of starting it."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options) or CONTEXT)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for name in (*SETTINGS, "RAY_ADDRESS", "RAY_AUTH_TOKEN"):
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
    monkeypatch.setattr(
        ray, "init", lambda **options: made.append(parameter.RayParams()) or CONTEXT
    )
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
    monkeypatch.setattr(
        ray, "init", lambda **options: made.append(parameter.RayParams()) or CONTEXT
    )
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
        lambda **options: (
            modes.append(stat.S_IMODE(token.stat().st_mode) if token.exists() else None) or CONTEXT
        ),
    )
    with ray_session(address):
        pass
    # That of a cluster is not this run's.
    assert modes == [0o600 if address is None else None]


@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
@pytest.mark.parametrize(
    "error",
    [Exception("The current node timed out during startup."), OSError("no room"), ValueError("x")],
)
def test_whatever_ray_raises_as_it_starts_is_one_message(
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    error: Exception,
) -> None:
    def init(**options: Any) -> None:
        raise error

    monkeypatch.setattr("rayfed_lora.launching.ray_session.unreachable_cluster", lambda where: None)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourceError, match=re.escape(str(error))), ray_session(address):
        pass


@pytest.mark.parametrize(
    ("error", "kept"),
    [(None, False), (InterruptedRunError("stopped"), False), (RunError("lost"), True)],
)
def test_the_session_of_a_ray_of_our_own_is_kept_where_the_run_failed(
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception | None,
    kept: bool,
) -> None:
    session, other = tmp_path / "session_x_1", tmp_path / "session_y_2"
    for folder in (session, other):
        folder.mkdir()
    context = SimpleNamespace(address_info={"session_dir": str(session)})
    monkeypatch.setattr(ray, "init", lambda **options: context)
    with suppress(InterruptedRunError, RunError), ray_session(None):
        if error is not None:
            raise error
    assert (session.exists(), other.exists()) == (kept, True)


def test_a_temporary_path_too_long_for_ray_is_told_and_another_one_is_taken(
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 90)
    with ray_session(None):
        pass
    assert [call["_temp_dir"] for call in started] == ["/tmp/ray"]
    assert "bytes too long for Ray's sockets; they are in /tmp/ray" in capsys.readouterr().err
