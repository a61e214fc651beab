"""`ray up`, jobs through the tunnel and `ray down`, from beside some machines."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.hosts import Hosts

ROOT = Path(__file__).parents[2]
DASHBOARD = "http://127.0.0.1:8265"
LAUNCH_S = 300.0
# Of a shipped recipe, so that a run of it is short: five rounds.
SHORTER = [
    "annealing.initiating.rounds=1",
    "annealing.heating.rounds=1",
    "annealing.cooling.rounds=2",
    "annealing.holding.rounds=1",
    "clients.local_steps=2",
    "runtime.client_actors=2",
]
CURL = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]


class Launcher:
    """One cluster file, used as its user does, in the repository's root."""

    def __init__(self, hosts: Hosts, config: Mapping[str, Any], **environment: str) -> None:
        """Write the file beside the machines.

        Args:
            hosts: where the cluster will be.
            config: of the cluster.
            environment: of the commands, beside the token's.
        """
        self._hosts = hosts
        self._environment = hosts.environment(environment)
        self.file = hosts.work / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def call(self, *arguments: str, timeout_s: float = LAUNCH_S) -> str:
        """Run a command to its end and return its output."""
        done = subprocess.run(
            self._hosts.command(["timeout", str(timeout_s), *arguments]),
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-6000:]}"
        return done.stdout

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Start the cluster, open the tunnel; take both down in the end."""
        self.call("ray", "up", "--yes", "--no-config-cache", str(self.file))
        with self._tunnel():
            yield
        self.call("ray", "down", "--yes", str(self.file))

    @contextlib.contextmanager
    def _tunnel(self) -> Iterator[None]:
        log = self._hosts.work / "tunnel.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._hosts.command(["ray", "dashboard", str(self.file)]),
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.wait_until(lambda: self.answer(token=None) != 0, 60)
            yield
        finally:
            process.kill()
            process.wait()

    def answer(self, token: str | None) -> int:
        """Return the HTTP status of a request to the dashboard, 0 where there is no answer."""
        header = [] if token is None else ["-H", f"Authorization: Bearer {token}"]
        shown = subprocess.run(
            self._hosts.command([*CURL, *header, f"{DASHBOARD}/api/v0/nodes"]),
            check=False,
            capture_output=True,
            text=True,
        )
        return int(shown.stdout or 0)

    def job(self, *entrypoint: str, options: Sequence[str] = (), timeout_s: float = 600) -> str:
        """Submit a job, wait for its end and return its log."""
        submit = ["ray", "job", "submit", "--address", DASHBOARD, *options, "--"]
        log = self.call(*submit, *entrypoint, timeout_s=timeout_s)
        assert "succeeded" in log
        return log

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """Return what Ray's state has of a kind, such as nodes or actors."""
        listing = ["ray", "list", kind, "--address", DASHBOARD, "--detail", "--format", "json"]
        shown = self.call(*listing, timeout_s=60)
        found: list[dict[str, Any]] = json.loads(shown[shown.index("[") :])
        return found

    def nodes(self) -> set[str]:
        """Return the addresses of the nodes that are alive."""
        return {node["node_ip"] for node in self.listed("nodes") if node["state"] == "ALIVE"}

    @staticmethod
    def wait_until(done: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"waited {seconds:g} s"
            time.sleep(1)
