"""The check of recipes: room for their actors, memory, data and model. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayfed_lora.doctor.findings import Finding
from rayfed_lora.engines.on_ray.placement import Layout, Node, layout, nodes_of, wanted
from rayfed_lora.errors import BadInputError, ResourceError
from rayfed_lora.launching.planning import plan
from rayfed_lora.recipe.recipe import Recipe


def check_recipes(
    recipes: Sequence[Recipe], shipped: bool, ray_nodes: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Return how many actors of each recipe fit, and the memory that they need.

    Args:
        recipes: to check.
        shipped: the user did not name these recipes: missing data are a warning, not a fault.
        ray_nodes: entries of `ray.nodes()`.
    """
    nodes = nodes_of(ray_nodes)
    memory = [float(node["Resources"].get("memory", 0.0)) / 1e6 for node in ray_nodes]
    found = []
    for recipe in recipes:
        subject = f"recipe {recipe.name}"
        try:
            actor_mb = plan(recipe).actor_mb
            if recipe.runtime.scale_up_s is not None:
                actors = wanted(recipe.runtime)
                text = (
                    f"waits for nodes with {actors.actors} times {actors.cpus:g} CPU and"
                    f" {actors.gpus:g} GPU (runtime.scale_up_s)"
                )
                found.append(Finding("ok", subject, text))
                continue
            most = recipe.cohort_size(recipe.data.partition.clients)
            actors = layout(recipe.runtime, nodes, most)
        except ResourceError as error:
            fix = "ask for less, or add nodes"
            found.append(Finding("fault", subject, str(error), fix))
        except BadInputError as error:
            fix = "install what it names on every node, or name other data or another model"
            found.append(Finding("warning" if shipped else "fault", subject, str(error), fix))
        else:
            found.append(_fit(subject, actors, actor_mb, nodes, memory))
    return found


def _fit(
    subject: str, actors: Layout, actor_mb: float, nodes: Sequence[Node], memory: Sequence[float]
) -> Finding:
    """Compare the memory that actors take on each node with the memory that Ray has there."""
    share = f"{actors.cpus:g} CPU" + (f" and {actors.gpus:g} GPU" if actors.gpus else "")
    text = (
        f"{actors.actors} client actors of {share} fit, about {actor_mb / 1e3:.2f} GB of memory"
        " each, without activations"
    )
    for node, free_mb in zip(nodes, memory, strict=True):
        here = min(actors.actors, actors.most_on(node))
        if free_mb > 0 and here * actor_mb > free_mb:
            text += f"; {here} on one node need more than its {free_mb / 1e3:.1f} GB"
            fix = "lower runtime.client_actors, or raise cpus_per_actor or gpus_per_actor"
            return Finding("warning", subject, text, fix)
    return Finding("ok", subject, text)
