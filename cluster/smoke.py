"""Ask a cluster for GPUs, wait until they are there, and print which nodes have them.

A first job on a new cluster, and a way to have the nodes of a run ready, since a run takes those
that are there when it starts: `python smoke.py --gpus 4`.
"""

from __future__ import annotations

import argparse
import socket

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(num_cpus=0, num_gpus=1)
def where() -> tuple[str, list[int]]:
    """Return this node's name and the GPU that the task was given."""
    return socket.gethostname(), [int(gpu) for gpu in ray.get_gpu_ids()]


def main() -> None:
    """Reserve the GPUs all at once, so that an autoscaler starts all nodes at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=1200)
    asked = parser.parse_args()
    ray.init()
    group = placement_group([{"GPU": 1}] * asked.gpus)
    ray.get(group.ready(), timeout=asked.timeout_s)
    strategies = [PlacementGroupSchedulingStrategy(group, i) for i in range(asked.gpus)]
    tasks = [where.options(scheduling_strategy=strategy).remote() for strategy in strategies]
    for host, gpus in ray.get(tasks):
        print(f"GPU {gpus[0]} of {host}")
    remove_placement_group(group)


if __name__ == "__main__":
    main()
