"""cluster/local.yaml on machines that are namespaces of this one."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.e2e.hosts import TOKEN, hosts, require
from tests.e2e.launching import ROOT, SHORTER, Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(1200)]


def test_a_run_on_two_machines_is_read_from_their_shared_folder(tmp_path: Path) -> None:
    require()
    config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    with hosts(tmp_path, ["head", "w1"]) as made:
        config["provider"] |= {
            "head_ip": made.addresses["head"],
            "worker_ips": [made.addresses["w1"]],
        }
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(made.key)}
        launcher = Launcher(made, config)
        with launcher.up():
            launcher.wait_until(lambda: launcher.nodes() == {*made.addresses.values()}, 120)
            assert (launcher.answer(token=None), launcher.answer(TOKEN)) == (401, 200)
            assert not made.reachable(made.addresses["head"], 8265)

            cpus = min(node["resources_total"]["CPU"] for node in launcher.listed("nodes"))
            out = tmp_path / "shared" / "run"
            # An actor takes all cores of a machine: there is one on each.
            chosen = [*SHORTER, f"runtime.cpus_per_actor={cpus:g}"]
            launcher.job("rayfed-lora", "run", "digits-vit", "--out", str(out), "--set", *chosen)
            assert json.loads((out / "summary.json").read_text())["rounds"] == 5
            assert len(pd.read_parquet(out / "rounds.parquet")) == 5
            clients = [a for a in launcher.listed("actors") if a["class_name"] == "ClientActor"]
            assert len({actor["node_id"] for actor in clients}) == 2
        # The head's is stopped; who has lost the head ends within a minute.
        for name in made.addresses:
            launcher.wait_until(lambda name=name: "raylet" not in made.processes(name), 120)
        assert not {"raylet", "gcs_server"} & made.processes("head")
