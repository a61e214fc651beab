"""A doctor at a cluster of two nodes, healthy and ailing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.heads import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.timeout(600)]

# A cluster in a process of its own, so that it ends with it.
PROGRAM = """
import os, sys
from ray.cluster_utils import Cluster
from rayfed_lora.cli import commands as cli
from rayfed_lora.diagnosis import node_report
from tests import ailing

port, storage, ail = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "ailing"
cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "gcs_server_port": port, "include_dashboard": False},
)
cluster.add_node(num_cpus=2, num_gpus=1)
if ail:
    node_report.inspect = ailing.inspect_older_torch
sys.argv = ["rayfed-lora", "doctor", "--address", cluster.address, "--recipe", "digits-vit",
    "--storage", storage]
try:
    cli.main()
finally:
    cluster.shutdown()
"""


def examined(storage: Path, state: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (port,) = free_ports(1)
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(port), str(storage), state],
        env={**own, "PYTHONPATH": root, "COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_healthy_nodes_have_no_fault(tmp_path: Path) -> None:
    done = examined(tmp_path / "runs", "healthy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok      nodes: 2 of 2 answered" in done.stdout
    assert "ok      ports: each node gets objects of the next one" in done.stdout
    assert "every node can write to it and read files of the others" in done.stdout
    # By the only GPU: one actor.
    assert "recipe digits-vit: 1 client actors of 1 CPU and 1 GPU fit" in done.stdout
    assert "0 faults" in done.stdout
    assert "warning dashboard: none answers" in done.stdout


def test_another_torch_and_a_folder_that_cannot_be_written_end_with_status_1(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    done = examined(tmp_path / "file" / "runs", "ailing")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fault   version of torch: " in done.stdout
    assert "1.0.0 on " in done.stdout
    assert "fix: install the same torch on every node" in done.stdout
    assert done.stdout.count("cannot write to it") == 2
