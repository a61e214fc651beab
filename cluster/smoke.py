"""Wait until a cluster has GPUs, print which nodes they are on, then run a command.

A first job on a new cluster: `python smoke.py`. And what brings the nodes of a run, which takes
those that are there when it starts: `python smoke.py --gpus 4 rayfed-lora run RECIPE --out URI`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(num_cpus=0, num_gpus=1)
def where() -> tuple[str, list[int]]:
    """Return this node's name and the GPU that the task was given."""
    return socket.gethostname(), [int(gpu) for gpu in ray.get_gpu_ids()]


def main() -> None:
    """Reserve the GPUs all at once, so that an autoscaler starts all nodes at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=1200)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    ray.init()
    group = placement_group([{"GPU": 1}] * asked.gpus)
    if not group.wait(asked.timeout_s):
        sys.exit(
            f"waited {asked.timeout_s:g} s for {asked.gpus} GPUs; see `ray status` on the head"
        )
    strategies = [PlacementGroupSchedulingStrategy(group, i) for i in range(asked.gpus)]
    tasks = [where.options(scheduling_strategy=strategy).remote() for strategy in strategies]
    for host, gpus in ray.get(tasks):
        print(f"GPU {gpus[0]} of {host}", flush=True)
    remove_placement_group(group)
    ray.shutdown()
    if asked.command:
        os.execvp(asked.command[0], asked.command)


if __name__ == "__main__":
    main()
