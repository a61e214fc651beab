"""A run and a search over two nodes whose folders are shared, as on NFS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.e2e.processes import WAIT_S, environment
from tests.e2e.test_kill_and_resume import RECIPE, ROUNDS

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(900)]

SPACE = {
    "parameters": {"annealing.heating.rank": {"choice": [2, 4]}},
    "objectives": {"eval_loss": "min"},
    "scheduler": "none",
    "search": "grid",
}
# One CPU a node, so that two client actors, or trials, need both. The second node dies in mid-run.
SCRIPT = """\
import json, sys
from ray.cluster_utils import Cluster
import ray
import rayfed_lora
from rayfed_lora.errors import RayfedError
from rayfed_lora.tuning.tune import tune

recipe, space, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
settings = ["runtime.client_actors=2", "runtime.executor=ray", "runtime.start_timeout_s=20"]
loaded = rayfed_lora.load_recipe(recipe, settings)
seen = set()

def watch(status):
    global second
    if status.rounds_done >= 3 and second is not None:
        second, gone = None, second
        seen.update(node["NodeName"] + node["NodeID"] for node in ray.nodes() if node["Alive"])
        cluster.remove_node(gone, allow_graceful=False)

try:
    rayfed_lora.run(loaded, out + "/run", address=cluster.address, watch=watch)
    ended = "done"
except RayfedError as error:
    ended = type(error).__name__
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
rayfed_lora.run(loaded, out + "/run", address=cluster.address, resume=True)
one_actor = ["runtime.client_actors=1"]
tune(space, recipe, out + "/search", settings=one_actor, address=cluster.address)
print(json.dumps({"nodes": len(seen), "ended": ended}))
cluster.shutdown()
"""


def test_nodes_share_a_folder_and_one_that_dies_costs_no_round(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(recipe), json.dumps(SPACE), str(tmp_path / "shared")],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=3 * WAIT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["nodes"] == 2
    shared = tmp_path / "shared"
    alone = subprocess.run(
        [
            *(
                sys.executable,
                "-c",
                "from rayfed_lora.cli.commands import main; main()",
                "run",
                str(recipe),
            ),
            *("--out", str(tmp_path / "alone"), "--set", "runtime.executor=local"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=WAIT_S,
    )
    assert (alone.returncode, alone.stderr) == (0, "")
    one, other = (
        json.loads((f / "summary.json").read_text()) for f in (shared / "run", tmp_path / "alone")
    )
    assert one["rounds"] == ROUNDS
    assert one["adapter_sha256"] == other["adapter_sha256"]
    trials = pd.read_parquet(shared / "search" / "trials.parquet")
    assert trials["status"].tolist() == ["finished"] * 2
