"""Two thousand rounds: memory that does not grow, and an object store that is empty at the end."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from tests.e2e.processes import command, environment

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(1800)]

ROUNDS = 2_000
RECIPE = f"""\
name: soak
data: {{source: digits, max_examples: 60, partition: {{clients: 4}}}}
model:
  config: {{architecture: vit, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
    intermediate_size: 8, patch_size: 4}}
annealing:
  initiating: {{rounds: 2}}
  heating: {{rounds: 4, rank: 4}}
  cooling: {{rounds: {ROUNDS - 10}, rank: 1, shape: linear, residual: fold}}
  holding: {{rounds: 4}}
clients: {{per_round: 2, local_steps: 1, batch_size: 4}}
evaluation: {{every: 10}}
runtime: {{device: cpu, client_actors: 2}}
storage: {{checkpoint_every: 20}}
"""
# Memory that libraries take once, and keep, goes on rising a little after the first rounds.
WARM = 500
GROWTH_MB = 12


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


def memory_mb(cluster: Any) -> dict[str, float]:
    """Return the memory of its own that each of the run's actors has, by kind and process."""
    raylets = {
        info.process.pid
        for node in cluster.list_all_nodes()
        for info in node.all_processes["raylet"]
    }
    found = {}
    for process in psutil.process_iter():
        try:
            name = " ".join(process.cmdline())
            ours = any(parent.pid in raylets for parent in process.parents())
            # The agents are Ray's own.
            if ours and name.startswith("ray::") and not name.endswith(("IDLE", "Agent")):
                used = process.memory_full_info().uss / 1e6
                kind = "server" if "Simulation" in name else "client"
                found[f"{kind} {process.pid}"] = used
        except psutil.Error:
            continue
    return found


def rounds_done(out: Path) -> int:
    names = [path.parent.name for path in out.glob("checkpoints/round-*/manifest.json")]
    return max((int(name.removeprefix("round-")) for name in names), default=0)


def test_memory_stays_flat_over_two_thousand_rounds(cluster: Any, tmp_path: Path) -> None:
    recipe, out = tmp_path / "soak.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    arguments = ["run", str(recipe), "--out", str(out), "--address", cluster.address]
    warm: dict[str, float] = {}
    last: dict[str, float] = {}
    with subprocess.Popen(
        command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as run:
        while run.poll() is None:
            time.sleep(1.0)
            done = rounds_done(out)
            if not warm and done >= WARM:
                warm = memory_mb(cluster)
            if WARM <= done < ROUNDS - 200:
                # Not the very last ones: to export the model, an actor imports what others do not.
                last = memory_mb(cluster) or last
        assert run.returncode == 0, run.stderr.read() if run.stderr else ""
    assert len(pd.read_parquet(out / "rounds.parquet")) == ROUNDS
    kinds = {name.split()[0] for name in warm}
    assert kinds == {"server", "client"}
    for name, before in warm.items():
        assert last[name] - before < GROWTH_MB, (name, before, last[name])
    assert objects_held(cluster) == 0


def objects_held(cluster: Any) -> int:
    """Return how many objects lie in the cluster's object stores; Ray frees them each second."""
    from ray._private.internal_api import memory_summary

    time.sleep(3)
    found = re.search(r", (\d+) objects", memory_summary(cluster.address, stats_only=True))
    assert found is not None
    return int(found.group(1))
