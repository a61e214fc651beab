"""Client actors in their placement groups, and what they share: for one run, or for several.

Source: this project.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
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
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayfed_lora.engines.factory import Factory, prepared
from rayfed_lora.engines.on_ray.actors import ClientActor, calls_at_once
from rayfed_lora.engines.on_ray.placement import Layout, layout, nodes_of, wanted
from rayfed_lora.engines.on_ray.shelf import PREPARING, prepared_from
from rayfed_lora.errors import ResourceError
from rayfed_lora.recipe.recipe import Recipe

_POLL_S = 0.5
# How often to look whether the node of a lost actor is gone.
_RENEWED_S = 10.0
# How long a run holds a part of what it waits for.
_PATIENCE_S = {"start_timeout_s": 10.0, "scale_up_s": 60.0}
# A bundle of a placement group.
Place = tuple[PlacementGroup, int]


class Crew:
    """Actors that are ready to be opened for a recipe, again and again."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Layout,
        places: Sequence[Place],
        shelf: Any = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Start the actors.

        Args:
            recipe: names them.
            plan: how many, and their shares.
            places: where each of them goes.
            shelf: actor handle of a `Shelf` that prepares data and base, for crews beside this one
                too; None: the first actor of the crew does.
            group_name: each place is a group of its own, the crew's to remove, so named but for a
                number; None: the places are others'.
        """
        self._name = recipe.name
        self._plan = plan
        self._places = list(places)
        self._shelf = shelf
        self._group_name = group_name
        self._renewals = 0
        self.actors = [self._start(i) for i in range(plan.actors)]
        # References of the newest workload and of its base's weights, by what they are made from.
        self._shared: tuple[str, list[ray.ObjectRef]] = ("", [])

    @classmethod
    def reserved(cls, recipe: Recipe, name: str, *, fewer: bool = False) -> Crew:
        """Check that the actors fit the cluster, reserve their shares and start them.

        Args:
            recipe: gives `runtime`, and how many actors are of use.
            name: of the placement groups, but for a number: unique in the cluster, and the same
                when a lost driver goes on. What that one had reserved is given back first: Ray
                would keep it while the job lives.
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
        _free_leftovers(name)
        places = [(group, 0) for group in _reserve(plan, name, *limit)]
        return cls(recipe, plan, places, group_name=name)

    def _start(self, index: int) -> Any:
        group, bundle = self._places[index]
        strategy = PlacementGroupSchedulingStrategy(
            group,
            placement_group_bundle_index=bundle,
            placement_group_capture_child_tasks=False,
        )
        options = {
            "num_cpus": self._plan.cpus,
            "num_gpus": self._plan.gpus,
            "max_concurrency": calls_at_once(self._plan.trainers),
            "max_restarts": -1,
            # The same work on another actor gives the same result: the pool decides.
            "max_task_retries": 0,
            "scheduling_strategy": strategy,
        }
        actor = ray.remote(ClientActor).options(**options)
        name = f"client-actor-{index:02d} of {self._name}"
        return actor.remote(self._plan.gpus, name, self._plan.trainers)

    @property
    def gpus(self) -> float:
        """GPU share of each of the actors."""
        return self._plan.gpus

    @property
    def trainers(self) -> int:
        """How many blocks each of the actors trains at once."""
        return self._plan.trainers

    def renewed(self, actor: Any) -> Any:
        """Return an actor in place of one whose node is gone; the same one where it is not.

        The new one starts when a node has room for it. Its group is a new one too: one that has
        lost its node is tried again without a pause, which keeps the head node busy (Ray's pull
        request 65007), and one that never had a node with growing pauses.
        """
        index = self.actors.index(actor)
        group, _ = self._places[index]
        if self._group_name is None or placement_group_table(group).get("state") != "RESCHEDULING":
            return actor
        remove_placement_group(group)
        self._renewals += 1
        number = len(self._places) + self._renewals
        self._places[index] = _group(self._plan, self._group_name, number), 0
        self.actors[index] = self._start(index)
        return self.actors[index]

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

    def prepare_again(self, recipe: Recipe, factory: Factory) -> list[ray.ObjectRef]:
        """Return new references of workload and weights, which were lost with their node.

        A task makes them: Ray makes again what a task has made, but not what an actor has.
        """
        task = ray.remote(prepared).options(name=PREPARING, num_cpus=0, num_returns=3)
        _, *shared = task.remote(recipe, factory)
        self._shared = prepared_from(recipe), shared
        return self._shared[1]

    def wait(self, timeout_s: float) -> bool:
        """Wait until all actors answer; return whether they do.

        A run that has ended may have left one that Ray is still starting again.
        """
        deadline = time.monotonic() + timeout_s
        return all(_answers(actor, deadline) for actor in self.actors)

    def back(self, index: int, timeout_s: float) -> bool:
        """Wait until a lost actor, or another one in its place, answers; return whether it does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            actor = self.renewed(self.actors[index])
            if _answers(actor, min(deadline, time.monotonic() + _RENEWED_S)):
                return True
            time.sleep(_POLL_S)
        return False

    def forget(self) -> None:
        """Let go of the workload: preparing it failed, or nobody needs it."""
        self._shared = ("", [])

    def close(self) -> None:
        """End the actors and give their resources back."""
        if self._group_name is not None:
            _remove(group for group, _ in self._places)
        self.actors = []
        self.forget()


def _answers(actor: Any, deadline: float) -> bool:
    """Wait for an actor that may be starting; return whether it answers by then."""
    while True:
        try:
            left_s = max(deadline - time.monotonic(), 0.0)
            ray.get(actor.__ray_ready__.remote(), timeout=left_s)
            return True
        except (ActorUnavailableError, OutOfMemoryError):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        except (ActorDiedError, GetTimeoutError):
            return False


def _group(plan: Layout, name: str, number: int) -> PlacementGroup:
    return placement_group([plan.bundle], name=f"{name} {number:03d}")


def _free_leftovers(name: str) -> None:
    table = placement_group_table().values()
    names = [each["name"] for each in table if each["state"] != "REMOVED"]
    _remove(get_placement_group(each) for each in names if each.startswith(f"{name} "))


def _remove(groups: Iterable[PlacementGroup]) -> None:
    for group in groups:
        remove_placement_group(group)


def _reserve(plan: Layout, name: str, key: str, timeout_s: float) -> list[PlacementGroup]:
    """Reserve a group for each actor: what becomes of one is no matter to the others.

    Runs that wait for the same nodes must not hold a part each for ever: who has not got all lets
    go of all from time to time, for a while.

    Raises:
        ResourceError: they were not there in time; nothing stays reserved.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        groups = [_group(plan, name, i) for i in range(plan.actors)]
        left_s = max(deadline - time.monotonic(), 0.0)
        patience_s = random.uniform(1.0, 2.0) * _PATIENCE_S[key]
        ready = [group.ready() for group in groups]
        _, late = ray.wait(ready, num_returns=len(ready), timeout=min(left_s, patience_s))
        if not late:
            return groups
        free = ray.available_resources()
        _remove(groups)
        if left_s <= patience_s:
            raise ResourceError(
                f"waited {timeout_s:g} s (runtime.{key}) for {plan.actors} client actors of"
                f" {plan.cpus:g} CPU and {plan.gpus:g} GPU, and got {len(groups) - len(late)};"
                f" free beside them: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU, the"
                " rest is in use by others"
            )
        time.sleep(random.uniform(0.1, 0.5) * patience_s)
