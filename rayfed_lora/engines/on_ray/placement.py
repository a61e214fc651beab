"""How many client actors a cluster holds, and why not more. Source: this project.

Ray's rules behind it: a share of up to one GPU lies on one GPU, more than one is whole GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayfed_lora.errors import ResourceError
from rayfed_lora.recipe.runtime import Runtime

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers, in Ray's logical units."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Layout:
    """The client actors of a run.

    Attributes:
        actors: how many.
        cpus: CPU cores each.
        gpus: GPUs each, 0 on the CPU.
        trainers: blocks that each trains at once.
    """

    actors: int
    cpus: float
    gpus: float
    trainers: int = 1

    @property
    def bundle(self) -> dict[str, float]:
        """What an actor's placement group reserves."""
        share = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: value for name, value in share.items() if value > 0}

    def most_on(self, node: Node) -> int:
        """Return how many of such actors one machine could hold."""
        return _capacity(node, self.cpus, self.gpus)


def nodes_of(ray_nodes: Sequence[Mapping[str, object]]) -> list[Node]:
    """Return the live nodes of `ray.nodes()`."""
    found = []
    for node in ray_nodes:
        resources = node["Resources"]
        if node["Alive"] and isinstance(resources, Mapping):
            cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
            found.append(Node(float(cpus), float(gpus)))
    return found


def layout(runtime: Runtime, nodes: Sequence[Node], most: int) -> Layout:
    """Return the actors that a run gets; the same recipe runs on a cluster with and without GPUs.

    Without a GPU in the cluster, or with device `cpu`, actors take CPU shares only.

    Args:
        runtime: the recipe's section.
        nodes: what the cluster has in all, in use or not.
        most: number of blocks that could be trained at once, for `client_actors: auto`.

    Raises:
        ResourceError: what is asked for can never fit; says what is missing.
    """
    gpus = _gpu_share(runtime, nodes)
    capacity = sum(_capacity(node, runtime.cpus_per_actor, gpus) for node in nodes)
    wanted = runtime.client_actors
    trainers = _trainers(runtime, gpus)
    actors = min(capacity, math.ceil(most / trainers)) if wanted == "auto" else wanted
    if actors < 1 or actors > capacity:
        share = f"{runtime.cpus_per_actor:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        have = "; ".join(f"{n.cpus:g} CPU, {n.gpus:g} GPU" for n in nodes) or "no live node"
        raise ResourceError(
            f"the cluster cannot hold {max(actors, 1)} client actors of {share} each"
            f" (runtime.client_actors, cpus_per_actor, gpus_per_actor): it holds {capacity}."
            f" Nodes: {have}"
        )
    return Layout(actors, runtime.cpus_per_actor, gpus, trainers)


def wanted(runtime: Runtime) -> Layout:
    """Return the actors that a recipe with `scale_up_s` asks for, whatever nodes there are."""
    gpus = 1.0 if runtime.gpus_per_actor == "auto" else runtime.gpus_per_actor
    actors = 1 if runtime.client_actors == "auto" else runtime.client_actors
    gpus = gpus if runtime.device == "cuda" else 0.0
    return Layout(actors, runtime.cpus_per_actor, gpus, _trainers(runtime, gpus))


def _trainers(runtime: Runtime, gpus: float) -> int:
    return 1 if gpus > 0 else runtime.trainers_per_actor


def _gpu_share(runtime: Runtime, nodes: Sequence[Node]) -> float:
    there = any(node.gpus > 0 for node in nodes)
    if runtime.device == "cuda" and not there:
        have = "; ".join(f"{n.cpus:g} CPU, {n.gpus:g} GPU" for n in nodes)
        raise ResourceError(
            f"runtime.device 'cuda' needs a GPU, the cluster has none. Nodes: {have}."
            " With device 'auto' the recipe runs on CPUs"
        )
    if runtime.device == "cpu" or not there:
        return 0.0
    return 1.0 if runtime.gpus_per_actor == "auto" else runtime.gpus_per_actor


def _capacity(node: Node, cpus: float, gpus: float) -> int:
    by_cpu = math.floor(node.cpus / cpus + _ROUNDING)
    if gpus == 0:
        return by_cpu
    return min(by_cpu, math.floor(node.gpus) * math.floor(1 / gpus + _ROUNDING))
