"""Client actors in a placement group, and what they share: for one run, or for several.

Source: this project.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
)
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayfed_lora.errors import ResourceError
from rayfed_lora.recipe import Recipe
from rayfed_lora.runtime.actors import ClientActor
from rayfed_lora.runtime.factory import Factory
from rayfed_lora.runtime.placement import Layout, layout, nodes_of, wanted
from rayfed_lora.runtime.shelf import PREPARING, prepared_from

_POLL_S = 0.5


class Crew:
    """Actors that are ready to be opened for a recipe, again and again."""

    def __init__(
        self, recipe: Recipe, plan: Layout, group: PlacementGroup, shelf: Any = None
    ) -> None:
        """Start the actors.

        Args:
            recipe: names them.
            plan: how many, and their shares.
            group: has a bundle for each of them first.
            shelf: actor handle of a `Shelf` that prepares data and base, for crews beside this one
                too; None: the first actor of the crew does.
        """
        self._group = group
        self._shelf = shelf
        self.actors = [self._start(recipe, i, plan) for i in range(plan.actors)]
        # References of the newest workload and of its base's weights, by what they are made from.
        self._shared: tuple[str, list[ray.ObjectRef]] = ("", [])

    @classmethod
    def reserved(cls, recipe: Recipe, name: str, *, fewer: bool = False) -> Crew:
        """Check that the actors fit the cluster, reserve their shares and start them.

        Args:
            recipe: gives `runtime`, and how many actors are of use.
            name: of the placement group: unique in the cluster, and the same when a lost driver
                goes on. What that one had reserved is given back first: Ray would keep it while
                the job lives.
            fewer: take as many of the asked for actors as the nodes hold that are left: one at
                least.

        Raises:
            ResourceError: they do not fit, or what they need stayed in use for start_timeout_s, or
                did not come within scale_up_s.
        """
        most = recipe.cohort_size(recipe.data.partition.clients)
        runtime, limit = recipe.runtime, ("start_timeout_s", recipe.runtime.start_timeout_s)
        if fewer and runtime.client_actors != "auto":
            most = runtime.client_actors
            runtime = runtime.model_copy(update={"client_actors": "auto"})
        if runtime.scale_up_s is None:
            plan = layout(runtime, nodes_of(ray.nodes()), most)
        else:
            # What is reserved and does not fit is what an autoscaler brings nodes for.
            plan, limit = wanted(recipe.runtime), ("scale_up_s", runtime.scale_up_s)
        _free_leftover(name)
        return cls(recipe, plan, _reserve(plan, name, *limit))

    def _start(self, recipe: Recipe, index: int, plan: Layout) -> Any:
        strategy = PlacementGroupSchedulingStrategy(
            self._group,
            placement_group_bundle_index=index,
            placement_group_capture_child_tasks=False,
        )
        options = {
            "num_cpus": plan.cpus,
            "num_gpus": plan.gpus,
            "max_restarts": -1,
            # The same work on another actor gives the same result: the executor decides.
            "max_task_retries": 0,
            "scheduling_strategy": strategy,
        }
        actor = ray.remote(ClientActor).options(**options)
        return actor.remote(plan.gpus, f"client-actor-{index:02d} of {recipe.name}")

    def prepare(
        self, recipe: Recipe, factory: Factory
    ) -> tuple[ray.ObjectRef, list[ray.ObjectRef]]:
        """Let the first actor prepare data and base, unless they are those of the last recipe.

        Returns:
            What tells of success, and references of workload and weights, which the crew keeps: an
            actor that is started again fetches them anew.
        """
        made_from = prepared_from(recipe)
        if self._shared[0] == made_from:
            return ray.put(None), self._shared[1]
        if self._shelf is None:
            method = self.actors[0].prepare.options(name=PREPARING, num_returns=3)
            done, *shared = method.remote(recipe, factory)
        else:
            done, *shared = ray.get(self._shelf.prepared.remote(recipe, factory))
        self._shared = made_from, shared
        return done, shared

    def wait(self, timeout_s: float) -> bool:
        """Wait until all actors answer; return whether they do.

        A run that has ended may have left one that Ray is still starting again.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                ray.get(
                    [actor.__ray_ready__.remote() for actor in self.actors],
                    timeout=max(deadline - time.monotonic(), 0.0),
                )
                return True
            except (ActorUnavailableError, OutOfMemoryError):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
            except (ActorDiedError, GetTimeoutError):
                return False

    def forget(self) -> None:
        """Let go of the workload: preparing it failed, or nobody needs it."""
        self._shared = ("", [])

    def close(self) -> None:
        """End the actors and give their resources back."""
        remove_placement_group(self._group)
        self.actors = []
        self.forget()


def _free_leftover(name: str) -> None:
    try:
        leftover = get_placement_group(name)
    except ValueError:
        return
    remove_placement_group(leftover)


def _reserve(plan: Layout, name: str, key: str, timeout_s: float) -> PlacementGroup:
    group = placement_group(plan.bundles, strategy="PACK", name=name)
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError:
        remove_placement_group(group)
        free = ray.available_resources()
        raise ResourceError(
            f"waited {timeout_s:g} s (runtime.{key}) for {plan.actors} client actors of"
            f" {plan.cpus:g} CPU and {plan.gpus:g} GPU; free now: {free.get('CPU', 0):g} CPU,"
            f" {free.get('GPU', 0):g} GPU, the rest is in use by others"
        ) from None
    return group
