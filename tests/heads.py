"""A Ray head with a dashboard and a token, started by a test on ports of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

TOKEN = "0123456789abcdef0123456789abcdef"
_WAIT_S = 90.0


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        dashboard: URL of its dashboard.
        environment: of commands that use it, with its token.
        home: home folder of its jobs.
    """

    dashboard: str
    environment: dict[str, str]
    home: Path


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


@contextmanager
def running_head(cpus: int = 2) -> Iterator[Head]:
    """Start `ray start --head --block`; end it, and all that it started, by process id."""
    # Short: Ray's sockets lie in it, and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rf", dir="/tmp"))
    home = folder / "home"
    home.mkdir()
    port, dashboard, agent, agent_grpc, metrics, client, env = free_ports(7)
    programs = str(Path(sys.executable).parent)
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **own,
        "PATH": f"{programs}:{os.environ.get('PATH', '')}",
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Not those of a file: what is imported here is imported there.
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    arguments = [
        f"{programs}/ray", "start", "--head", "--block", f"--num-cpus={cpus}",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
        f"--runtime-env-agent-port={env}", "--min-worker-port=0", "--max-worker-port=0",
        f"--temp-dir={folder / 'ray'}", "--object-store-memory=200000000",
        "--disable-usage-stats",
    ]  # fmt: skip
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        arguments, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_for(url, process, folder / "head.log")
        yield Head(url, environment, home)
    finally:
        _end(process, str(folder))
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    request = urllib.request.Request(
        f"{url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    """Kill the head's processes: its descendants, and those that left it but name its folder."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for each in psutil.process_iter(["cmdline"]):
        if any(folder in part for part in each.info["cmdline"] or ()):
            family.append(each)
    for member in [psutil.Process(process.pid)] * (process.poll() is None) + family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
