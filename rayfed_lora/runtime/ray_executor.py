"""Clients on Ray actors: a placement group, one put a round, every actor kept busy.

Source: this project.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayTaskError,
)
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayfed_lora.errors import RayfedError, ResourceError, RunError
from rayfed_lora.federation.executor import Population
from rayfed_lora.recipe import Recipe
from rayfed_lora.runtime.actors import ClientActor, prepare_workload
from rayfed_lora.runtime.factory import Factory
from rayfed_lora.runtime.placement import Layout, layout, nodes_of
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientUpdate,
    EvaluationSums,
    FloatArray,
    LocalPlan,
    Split,
    Trainable,
)

_ATTEMPTS = 4
_RESTART_POLL_S = 0.5
_LOST = (ActorDiedError, ActorUnavailableError, OutOfMemoryError)
Call = Callable[[Any], ray.ObjectRef]


class RayExecutor:
    """Trains blocks on client actors; a lost actor's block is run again, to the same result."""

    def __init__(
        self,
        recipe: Recipe,
        factory: Factory,
        note: Callable[[str], None],
        run_id: str | None = None,
    ) -> None:
        """Keep the run; Ray must be initialised before `open`.

        Args:
            recipe: the run.
            factory: makes workload and trainers inside the workers.
            note: told of what the user should know, e.g. a lost actor.
            run_id: unique in the cluster, and the same when a lost driver goes on with the run:
                what the lost one had reserved is then given back first. None: a new one.
        """
        self._group_name = f"clients of {recipe.name} {run_id or uuid4().hex}"
        self._recipe = recipe
        self._factory = factory
        self._note = note
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        # Actors that Ray is restarting, by the call that tells when they are back.
        self._returning: dict[ray.ObjectRef, Any] = {}
        self._workload: ray.ObjectRef | None = None
        self._base: tuple[tuple[int, int], ray.ObjectRef] | None = None
        self._state: tuple[AdapterState, ray.ObjectRef] | None = None

    def open(self) -> Population:
        """Check that the run fits the cluster, then start the actors and prepare the data.

        Raises:
            ResourceError: it does not fit, or what it needs stayed in use for start_timeout_s.
            DataError: the data cannot be read or dealt.
            ModelError: the model does not fit the recipe.
        """
        recipe = self._recipe
        most = recipe.cohort_size(recipe.data.partition.clients)
        plan = layout(recipe.runtime, nodes_of(ray.nodes()), most)
        self._free_leftover()
        self._group = self._reserve(plan)
        prepare = ray.remote(prepare_workload).options(
            num_cpus=0, num_returns=2, name="prepare data"
        )
        # Kept for the whole run: an actor that is started again fetches the workload anew.
        self._workload, prepared = prepare.remote(recipe, self._factory)
        self._actors = [self._start(i, plan) for i in range(plan.actors)]
        opened = [actor.open.options(name="open").remote() for actor in self._actors]
        _result(prepared)
        try:
            populations = [_result(ready) for ready in opened]
        except _LOST as error:
            raise RunError(f"a client actor was lost while it started: {error}") from error
        population: Population = populations[0]
        return population

    def _free_leftover(self) -> None:
        """Remove the placement group of a driver that died: Ray keeps it while the job lives."""
        try:
            leftover = get_placement_group(self._group_name)
        except ValueError:
            return
        remove_placement_group(leftover)

    def _reserve(self, plan: Layout) -> PlacementGroup:
        group = placement_group(plan.bundles, strategy="PACK", name=self._group_name)
        timeout = self._recipe.runtime.start_timeout_s
        try:
            ray.get(group.ready(), timeout=timeout)
        except GetTimeoutError:
            remove_placement_group(group)
            free = ray.available_resources()
            raise ResourceError(
                f"waited {timeout:g} s (runtime.start_timeout_s) for {plan.actors} client actors of"
                f" {plan.cpus:g} CPU and {plan.gpus:g} GPU; free now: {free.get('CPU', 0):g} CPU,"
                f" {free.get('GPU', 0):g} GPU, the rest is in use by others"
            ) from None
        return group

    def _start(self, index: int, plan: Layout) -> Any:
        strategy = PlacementGroupSchedulingStrategy(
            self._group,
            placement_group_bundle_index=index,
            placement_group_capture_child_tasks=False,
        )
        name = f"client-actor-{index:02d}"
        options = {
            "num_cpus": plan.cpus,
            "num_gpus": plan.gpus,
            "max_restarts": -1,
            # The same work on another actor gives the same result: the executor decides.
            "max_task_retries": 0,
            "scheduling_strategy": strategy,
        }
        actor = ray.remote(ClientActor).options(**options)
        return actor.remote(self._recipe, self._factory, [self._workload], plan.gpus, name)

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        result: dict[str, FloatArray]
        (result,) = self._in_order([lambda actor: actor.initial_tensors.remote(trainable)])
        return result

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, blocks: Sequence[tuple[int, ...]]
    ) -> Iterator[ClientUpdate]:
        """Yield one update a client, in the order of the blocks; the state is put once."""
        state_ref, base_ref = self._put_state(state), self._put_base(base)

        def call(index: int, block: tuple[int, ...]) -> Call:
            name = f"round {plan.round} block {index}"
            return lambda actor: actor.train.options(name=name).remote(
                block, state_ref, base_ref, plan
            )

        for updates in self._in_order([call(i, block) for i, block in enumerate(blocks)]):
            yield from updates

    def evaluate(
        self,
        split: Split,
        shards: Sequence[slice],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
    ) -> list[EvaluationSums]:
        """Return the sums over each shard of rows, in order."""
        state_ref, base_ref = self._put_state(state), self._put_base(base)

        def call(rows: slice) -> Call:
            return lambda actor: actor.evaluate.remote(split, rows, state_ref, base_ref, trainable)

        return list(self._in_order([call(rows) for rows in shards]))

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        result: dict[str, bytes]
        (result,) = self._in_order([lambda actor: actor.export.remote(state, base, trainable)])
        return result

    def _put_state(self, state: AdapterState) -> ray.ObjectRef:
        """Put a state once: a round starts from what the one before was tested with."""
        if self._state is None or self._state[0] is not state:
            self._state = (state, ray.put(state))
        return self._state[1]

    def _put_base(self, base: Base) -> ray.ObjectRef:
        """Put a base into the object store once; the one before it is dropped."""
        key = (base.root, len(base.folds))
        if self._base is None or self._base[0] != key:
            self._base = (key, ray.put(base))
        return self._base[1]

    def _in_order(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Run each call on the next idle actor; yield the results in the calls' order.

        There is no barrier but the order of yielding: actors go on while a result waits for its
        turn. A call whose actor is lost is run again.
        """
        waiting = deque(range(len(calls)))
        away = list(self._returning.values())
        idle = deque(actor for actor in self._actors if actor not in away)
        running: dict[ray.ObjectRef, tuple[int, Any]] = {}
        results: dict[int, Any] = {}
        attempts = [0] * len(calls)
        turn = 0
        while turn < len(calls):
            while waiting and idle:
                index, actor = waiting.popleft(), idle.popleft()
                running[calls[index](actor)] = (index, actor)
            if turn in results:
                yield results.pop(turn)
                turn += 1
                continue
            ready = self._next_ready(list(running))
            if ready in self._returning:
                idle.extend(self._back(ready))
                continue
            index, actor = running.pop(ready)
            try:
                results[index] = _result(ready)
                idle.append(actor)
            except _LOST as error:
                attempts[index] += 1
                self._lost(error, attempts[index])
                waiting.appendleft(index)
                self._revive(actor, error)

    def _next_ready(self, running: list[ray.ObjectRef]) -> ray.ObjectRef:
        """Wait for a call or for an actor that is coming back.

        Raises:
            RunError: no actor is left, or none of those restarting came back in time.
        """
        pending = [*running, *self._returning]
        if not pending:
            raise RunError("every client actor is lost for good")
        timeout = None if running else self._recipe.runtime.start_timeout_s
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout, fetch_local=True)
        if not ready:
            raise RunError(f"no client actor came back within {timeout:g} s after it was lost")
        return ready[0]

    def _back(self, opened: ray.ObjectRef) -> list[Any]:
        """Return the actor that is back, none if it was lost again."""
        actor = self._returning.pop(opened)
        try:
            _result(opened)
        except _LOST as error:
            # Ray refuses calls for the seconds that a restart takes; do not ask in a tight loop.
            time.sleep(_RESTART_POLL_S)
            self._revive(actor, error)
            return []
        return [actor]

    def _revive(self, actor: Any, error: Exception) -> None:
        """Wait in the background for an actor that Ray restarts; forget one it does not."""
        if isinstance(error, ActorDiedError):
            self._actors.remove(actor)
        else:
            self._returning[actor.open.options(name="open").remote()] = actor

    def _lost(self, error: Exception, attempts: int) -> None:
        reason = str(error).strip().splitlines()[0]
        if attempts >= _ATTEMPTS:
            raise RunError(f"the same work lost {attempts} actors one after another: {reason}")
        self._note(f"a client actor was lost and its work is run again: {reason}")

    def close(self) -> None:
        """End the actors and give their resources back."""
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._actors, self._returning = None, [], {}
        self._workload, self._base, self._state = None, None, None


def _result(reference: ray.ObjectRef) -> Any:
    """Return a call's result; raise the user's errors as they were, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayfedError):
            raise cause from None
        raise RunError(f"a worker failed:\n{error}") from error
