"""Clients on Ray actors: one put a round, every actor kept busy.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias
from uuid import uuid4

import ray
from ray.exceptions import ObjectLostError

from rayfed_lora.aggregation.means import Means
from rayfed_lora.engines.factory import Factory
from rayfed_lora.engines.on_ray.actors import EvaluateTask, TestTask, TrainTask
from rayfed_lora.engines.on_ray.crew import Crew
from rayfed_lora.engines.on_ray.messages import Message, packed, unpacked
from rayfed_lora.engines.on_ray.pool import (
    ATTEMPTS,
    LOST,
    ActorPool,
    Job,
    PartsLostError,
    RemoteCall,
    Revival,
    Work,
    result,
)
from rayfed_lora.engines.usage import Usage
from rayfed_lora.errors import RunError
from rayfed_lora.federation.executor import (
    PATIENCE,
    Call,
    Pending,
    Population,
    Trained,
    joins,
)
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientScore,
    ClientUpdate,
    FloatArray,
    LocalPlan,
    Predictions,
    Split,
    Trainable,
)

# Each name of a task stays in the metrics of every process, with 15 kB (measured with Ray 2.60).
_MOST_NAMES = 1_000
# Bytes; below the 100 kB up to which Ray itself sends a value with the call.
_SENT_WITH_CALL = 1 << 16
# What is an argument of a call: small enough to go with it, or in the object store.
_Sent: TypeAlias = Message | ray.ObjectRef


class RayExecutor:
    """Trains blocks on client actors; a lost actor's block is run again, to the same result."""

    def __init__(
        self,
        recipe: Recipe,
        factory: Factory,
        note: Callable[[str], None],
        run_id: str | None = None,
        crew: Crew | None = None,
        *,
        again: bool = False,
        concurrent: bool = True,
    ) -> None:
        """Keep the run; Ray must be initialised before `open`.

        Args:
            recipe: the run.
            factory: makes workload and trainers inside the workers.
            note: told of what the user should know, e.g. a lost actor.
            run_id: unique in the cluster, and the same when a lost driver goes on with the run.
                None: a new one.
            crew: actors that others use after this run; None: own ones.
            again: a lost driver goes on, maybe on fewer nodes: with as many actors as they hold.
            concurrent: a round may be tested behind the training of the next one. Who may be ended
                after any round is better off without: what is trained ahead would be lost.
        """
        self.concurrent = concurrent
        self.patience = PATIENCE if concurrent else 0
        self._recipe = recipe
        self._factory = factory
        self._note = note
        self._name = f"clients of {recipe.name} {run_id or uuid4().hex}"
        self._lent = crew is not None
        self._again = again
        self._crew = crew
        self._pool: ActorPool | None = None
        # References of the workload and of the base's weights.
        self._shared: list[ray.ObjectRef] = []
        self._bases: dict[tuple[int, int], _Sent] = {}
        # The newest state, how it is sent, and its number.
        self._state: tuple[AdapterState, _Sent] | None = None
        self._states = 0
        self._busy_s, self._retried = 0.0, 0

    def open(self) -> Population:
        """Check that the run fits the cluster, then start the actors and prepare the data.

        Raises:
            ResourceError: it does not fit, or what it needs stayed in use for start_timeout_s.
            DataError: the data cannot be read or dealt.
            ModelError: the model does not fit the recipe.
        """
        crew = self._crew or Crew.reserved(self._recipe, self._name, fewer=self._again)
        self._crew = crew
        asked = self._recipe.runtime.client_actors
        if self._again and asked != "auto" and len(crew.actors) < asked:
            self._note(
                f"nodes were lost: going on with {len(crew.actors)} of {asked} client actors"
            )
        prepared, self._shared = crew.prepare(self._recipe, self._factory)
        opened = [self._open(actor) for actor in crew.actors]
        try:
            result(prepared)
        except BaseException as error:
            crew.forget()
            if isinstance(error, LOST):
                raise RunError(
                    f"a client actor was lost while it read the data: {error}"
                ) from error
            raise
        try:
            populations = [result(ready) for ready in opened]
        except LOST as error:
            raise RunError(f"a client actor was lost while it started: {error}") from error
        runtime = self._recipe.runtime
        timeout = max(runtime.start_timeout_s, runtime.scale_up_s or 0.0)
        # Blocks of as many steps each may be dealt out ahead; others go to whoever is free first.
        ahead = 0 if self._recipe.clients.local_steps is None else 1
        limit = runtime.block_timeout_s
        revival = Revival(self._open, crew.renewed, self._prepare_again)
        self._pool = ActorPool(
            crew.actors, revival, self._note, timeout, ahead, limit, crew.trainers
        )
        population: Population = populations[0]
        return population

    def _open(self, actor: Any) -> ray.ObjectRef:
        return actor.open.options(name="open").remote(self._recipe, self._factory, self._shared)

    def _prepare_again(self) -> None:
        if self._crew is not None:
            self._shared = self._crew.prepare_again(self._recipe, self._factory)

    def _opened(self) -> ActorPool:
        if self._pool is None:
            raise RuntimeError("the executor is not open: call open() first")
        return self._pool

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors that the first round starts from."""
        tensors: dict[str, FloatArray]
        tensors = self._one(
            "the first tensors", lambda actor, _: [actor.initial_tensors.remote(trainable)]
        )
        return tensors

    def _one(self, name: str, call: RemoteCall) -> Any:
        pool = self._opened()
        return pool.result(*pool.submit([Work(name, call, unpacked)]))

    def train(
        self, state: AdapterState, base: Base, plan: LocalPlan, calls: Sequence[Call]
    ) -> Generator[Trained, None, None]:
        """Start all calls, a large state put once; yield what comes of each call, in order."""
        number, *model = self._sent(state, base)
        few = self._recipe.annealing.total_rounds * len(calls) <= _MOST_NAMES
        apart = [len(run) > 1 for run in joins(calls) for _ in run]

        def remote(index: int, call: Call) -> Work:
            name = f"round {plan.round} block {index}"
            options = {"name": name if few else f"block {index}", "num_returns": 1 + apart[index]}

            def sent(actor: Any, halvings: int) -> list[ray.ObjectRef]:
                task = TrainTask(call.halved(halvings), plan, number, apart[index])
                found = actor.train.options(**options).remote(packed(task), *model)
                return found if apart[index] else [found]

            return Work(name, sent, unpacked, limited=True, round=plan.round, kind="train")

        jobs = self._opened().submit([remote(i, call) for i, call in enumerate(calls)])
        return self._collect(jobs, calls)

    def _collect(self, jobs: list[Job], calls: Sequence[Call]) -> Generator[Trained, None, None]:
        pool = self._opened()
        call_of = dict(zip(jobs, calls, strict=True))
        try:
            for run in joins(jobs):
                told = 0
                for job in run:
                    reports: tuple[ClientUpdate, ...]
                    means: Means | None
                    reports, means = self._worked(job)
                    if job is run[-1] and means is None:
                        means = self._joined(run)
                    # Of all: a join may have them computed again that were told of before.
                    again = sum(max(each.begun - 1, 0) * len(call_of[each].blocks) for each in run)
                    yield Trained(reports, means, again - told)
                    told = again
                self._retried += sum((job.begun - 1) * len(call_of[job].clients) for job in run)
                # Told and joined: it need not stay until the round is over.
                for job in run:
                    job.value, job.rest = None, []
        finally:
            pool.drop(jobs)

    def _worked(self, job: Job) -> Any:
        """Return a timed call's result and book its time."""
        timed = self._opened().result(job)
        self._busy_s += timed.seconds
        return timed.value

    def usage(self) -> Usage:
        """Return what the actors have done since `open`."""
        pool = self._opened()
        return Usage(pool.actors, self._busy_s, pool.losses, self._retried, pool.at_once)

    def _joined(self, run: Sequence[Job]) -> Means:
        """Have an actor join the means of some calls; return them.

        What was lost with the machine that held it is computed again.
        """
        pool = self._opened()
        for _ in range(ATTEMPTS):
            try:
                return self._fetched([reference for job in run for reference in job.rest])
            except (ObjectLostError, PartsLostError) as error:
                self._note(f"results were lost and are computed again: {error}")
                for job in run:
                    pool.again(job)
                for job in run:
                    pool.result(job)
        raise RunError(f"the same results were lost {ATTEMPTS} times one after another")

    def _fetched(self, parts: list[ray.ObjectRef]) -> Means:
        pool = self._opened()
        work = Work("joining blocks", lambda actor, _: [actor.join.remote(*parts)], unpacked)
        (join,) = pool.submit([work], urgent=True)
        whole: Means = pool.result(join)
        return whole

    def evaluate(
        self,
        split: Split,
        shards: Sequence[slice],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
        before: int = 0,
    ) -> Pending[list[Predictions]]:
        """Start the evaluation of each shard of rows, behind all that waits."""
        number, *model = self._sent(state, base)
        name = f"evaluate {split}"

        def work(rows: slice) -> Work:
            task = packed(EvaluateTask(split, rows, trainable, number, before))
            return self._timed(
                name,
                lambda actor, _: [actor.evaluate.options(name=name).remote(task, *model)],
                before,
            )

        return self._pending([work(rows) for rows in shards])

    def test_clients(
        self,
        calls: Sequence[Call],
        state: AdapterState,
        base: Base,
        trainable: Trainable,
        before: int = 0,
    ) -> Pending[list[ClientScore]]:
        """Start tests on clients' own examples, behind all that waits."""
        number, *model = self._sent(state, base)
        name = "test clients"

        def work(call: Call) -> Work:
            task = packed(TestTask(call, trainable, number, before))
            return self._timed(
                name,
                lambda actor, _: [actor.test_clients.options(name=name).remote(task, *model)],
                before,
            )

        found = self._pending([work(call) for call in calls])
        return found.then(lambda parts: [score for part in parts for score in part])

    def _timed(self, name: str, call: RemoteCall, before: int) -> Work:
        return Work(name, call, unpacked, limited=True, before=before, kind=name)

    def _pending(self, works: Sequence[Work]) -> Pending[list[Any]]:
        jobs = self._opened().submit(works)
        return Pending(
            lambda: [self._worked(job) for job in jobs], lambda: all(job.done for job in jobs)
        )

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model."""
        _, *model = self._sent(state, base)
        files: dict[str, bytes]
        files = self._one("the export", lambda actor, _: [actor.export.remote(trainable, *model)])
        return files

    def _sent(self, state: AdapterState, base: Base) -> tuple[int, _Sent, _Sent]:
        """Return a state's number, and state and base as they are sent.

        A state is packed once: a round starts from what the one before was tested with. Of bases
        the last two: a round may start from another one than the round before it is tested with.
        """
        if self._state is None or self._state[0] is not state:
            self._state = (state, _put(state))
            self._states += 1
        key = base.version
        if key not in self._bases:
            self._bases = {**dict([*self._bases.items()][-1:]), key: _put(base)}
        return self._states, self._state[1], self._bases[key]

    def close(self) -> None:
        """End the actors and give their resources back, unless they are others' too."""
        if self._crew is not None and not self._lent:
            self._crew.close()
        self._crew, self._pool = None, None
        self._shared, self._bases, self._state = [], {}, None


def _put(value: AdapterState | Base) -> _Sent:
    """Return a value's message where it is small: it goes with each call; else put it once."""
    message = packed(value)
    small = isinstance(message, bytes) and len(message) <= _SENT_WITH_CALL
    return message if small else ray.put(message)
