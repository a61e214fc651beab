"""cluster/aws.yaml against a mock of EC2 whose instances are namespaces of this machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.aws_setup import REGION, VALUES
from tests.e2e.hosts import CONTROL, TOKEN, Hosts, hosts, require
from tests.e2e.launching import ROOT, SHORTER, Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(1200)]

PORT = 5000
ACCOUNT = {
    "AWS_ENDPOINT_URL": f"http://{CONTROL}:{PORT}",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}
# The mock gives out addresses from the fourth one on, the head first.
FIRST = 4
IDLE_MINUTES = 0.5


@contextlib.contextmanager
def mock_aws(made: Hosts) -> Iterator[None]:
    """Let the services answer where the machines can reach them, and nowhere else."""
    server = [sys.executable, "-m", "moto.server", "-H", CONTROL, "-p", str(PORT)]
    with (made.work / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            made.command(server),
            env=made.environment({}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        Launcher.wait_until(lambda: made.reachable(CONTROL, PORT), 60)
        yield
    finally:
        process.kill()
        process.wait()


def for_the_test(config: dict[str, Any], made: Hosts, subnet: str) -> dict[str, Any]:
    """Change what the mock lacks: public addresses, key pairs with a key, GPUs, patience."""
    config["provider"] |= {"use_internal_ips": True, "availability_zone": f"{REGION}a"}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(made.key)}
    config["idle_timeout_minutes"] = IDLE_MINUTES
    for kind in config["available_node_types"].values():
        kind["node_config"] |= {"SubnetIds": [subnet], "KeyName": "test"}
    config["worker_start_ray_commands"][-1] += " --num-cpus=2 --num-gpus=1"
    return config


def account(launcher: Launcher, *arguments: str) -> dict[str, Any]:
    shown = launcher.call(sys.executable, "-m", "tests.e2e.aws_account", *arguments)
    found: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return found


def test_gpu_nodes_on_aws_come_with_a_job_and_go_again(tmp_path: Path) -> None:
    require("moto.server")
    shipped = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    with hosts(tmp_path, ["head", "w1"], FIRST, **ACCOUNT) as made, mock_aws(made):
        head, worker = made.addresses.values()
        subnet = account(Launcher(made, {}, **ACCOUNT), "make", f"{made.key}.pub")["subnet"]
        launcher = Launcher(made, for_the_test(shipped, made, subnet), **ACCOUNT)
        with launcher.up():
            assert launcher.nodes() == {head}
            assert (launcher.answer(token=None), launcher.answer(TOKEN)) == (401, 200)
            assert not made.reachable(head, 8265)

            smoke = ["--working-dir", str(ROOT / "cluster")]
            assert "GPU 0 of w1" in launcher.job("python", "smoke.py", options=smoke)
            state = account(launcher, "show")
            assert state == {
                "instances": {
                    head: {"type": "m6i.2xlarge", "market": None, "profile": "rayfed-lora-head"},
                    worker: {
                        "type": "g5.2xlarge",
                        "market": "spot",
                        "profile": "rayfed-lora-worker",
                    },
                },
                "ports": ["22", "None"],
                "from": [VALUES["SshFrom"]],
            }
            # The mock's GPU is none that torch could use.
            out = f"s3://{VALUES['Bucket']}/first"
            run = ["rayfed-lora", "run", "digits-vit", "--out", out, "--set", *SHORTER]
            launcher.job("python", "smoke.py", *run, "runtime.device=cpu", options=smoke)
            assert account(launcher, "read", "first/summary.json")["rounds"] == 5
            launcher.wait_until(lambda: set(account(launcher, "show")["instances"]) == {head}, 240)
        assert account(launcher, "show")["instances"] == {}
