"""Clients on Ray actors: a model is sent once, every actor kept busy.

Source: this project.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import ObjectLostError

from rayfed_lora.engines.factory import Factory, on_device
from rayfed_lora.engines.on_ray.calls import LOST, Job, PartsLostError, Work, result
from rayfed_lora.engines.on_ray.crew import Crew
from rayfed_lora.engines.on_ray.messages import Message, packed, sent, unpacked
from rayfed_lora.engines.on_ray.pool import ATTEMPTS, ActorPool, Revival
from rayfed_lora.engines.usage import Usage
from rayfed_lora.errors import RunError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Pending, Population, Running, Task, runs
from rayfed_lora.types import AdapterState, Base, GlobalModel

R = TypeVar("R")
# Each name of a task stays in the metrics of every process, with 15 kB (measured with Ray 2.60).
_MOST_NAMES = 1_000


class RayEngine:
    """Has client actors answer; a lost actor's task is run again, to the same result."""

    def __init__(
        self,
        recipe: Recipe,
        factory: Factory,
        note: Callable[[str], None],
        run_id: str | None = None,
        crew: Crew | None = None,
        *,
        again: bool = False,
        step: Callable[[str], None] = lambda text: None,
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
            step: told of each step of `open`, in a few words.
        """
        self._recipe = recipe
        self._factory = factory
        self._note = note
        self._step = step
        self._name = f"clients of {recipe.name} {run_id or uuid4().hex}"
        self._lent = crew is not None
        self._again = again
        self._crew = crew
        self._pool: ActorPool | None = None
        # References of the workload and of the base's weights.
        self._shared: list[ray.ObjectRef] = []
        self._models = SentModels()
        self._names: set[str] = set()
        self._busy_s, self._retried = 0.0, 0

    def open(self) -> Population:
        """Check that the run fits the cluster, then start the actors and prepare the data.

        Raises:
            ResourceError: it does not fit, or what it needs stayed in use for start_timeout_s.
            DataError: the data cannot be read or dealt.
            ModelError: the model does not fit the recipe.
        """
        self._step("starting client actors")
        crew = self._crew or Crew.reserved(self._recipe, self._name, fewer=self._again)
        self._crew = crew
        self._recipe = on_device(self._recipe, "cuda" if crew.gpus > 0 else "cpu")
        asked = self._recipe.runtime.client_actors
        if self._again and asked != "auto" and len(crew.actors) < asked:
            self._note(
                f"nodes were lost: going on with {len(crew.actors)} of {asked} client actors"
            )
        self._step("loading data and model")
        opened = self._prepared(crew)
        self._step(f"opening {len(crew.actors)} client actors")
        populations = [self._started(crew, i, ready) for i, ready in enumerate(opened)]
        runtime = self._recipe.runtime
        timeout = max(runtime.start_timeout_s, runtime.scale_up_s or 0.0)
        # Blocks of equally many steps may be sent ahead; others go to the first free actor.
        ahead = 1 if isinstance(self._recipe.clients.local_steps, int) else 0
        revival = Revival(self._open, crew.renewed, self._prepare_again)
        self._pool = ActorPool(
            crew.actors,
            revival,
            self._note,
            timeout,
            ahead,
            runtime.block_timeout_s,
            crew.trainers,
        )
        population: Population = populations[0]
        return population

    def _prepared(self, crew: Crew) -> list[ray.ObjectRef]:
        """Prepare data and base, again if the actor is lost; return the calls that open actors."""
        for attempt in range(1, ATTEMPTS + 1):
            prepared, self._shared = crew.prepare(self._recipe, self._factory)
            opened = [self._open(actor) for actor in crew.actors]
            try:
                result(prepared)
                break
            except LOST as error:
                crew.forget()
                self._wait_for_lost(crew, 0, attempt, "read the data", error)
            except BaseException:
                crew.forget()
                raise
        return opened

    def _started(self, crew: Crew, index: int, opened: ray.ObjectRef) -> Population:
        """Wait until an actor is open; open it again if it, or what it needs, was lost."""
        attempt = 0
        while True:
            try:
                population: Population = result(opened)
                return population
            except (*LOST, PartsLostError) as error:
                attempt += 1
                if isinstance(error, PartsLostError):
                    self._prepare_again()
                self._wait_for_lost(crew, index, attempt, "started", error)
                opened = self._open(crew.actors[index])

    def _wait_for_lost(
        self, crew: Crew, index: int, attempt: int, doing: str, error: Exception
    ) -> None:
        """Wait until a lost actor is back; raise a RunError where it is lost for good."""
        reason = str(error).strip().splitlines()[0]
        what = f"a client actor, or its data, was lost while it {doing}"
        if attempt == ATTEMPTS:
            raise RunError(f"{what}, {ATTEMPTS} times one after another: {reason}") from error
        self._note(f"{what}; it is started again: {reason}")
        if not crew.back(index, self._recipe.runtime.start_timeout_s):
            raise RunError(f"{what}, and did not come back: {reason}") from error

    def _open(self, actor: Any) -> ray.ObjectRef:
        return actor.open.options(name="open").remote(self._recipe, self._factory, self._shared)

    def _prepare_again(self) -> None:
        if self._crew is not None:
            self._shared = self._crew.prepare_again(self._recipe, self._factory)

    def _opened(self) -> ActorPool:
        if self._pool is None:
            raise RuntimeError("the engine is not open: call open() first")
        return self._pool

    def submit(self, task: Task[R]) -> Running[R]:
        """Start a task's parts on the actors; results of many are joined there."""
        pool, model = self._opened(), self._models.sent(task.model)
        pending: deque[Pending[R]] = deque()
        jobs: list[Job] = []
        for run in runs(task):
            apart = len(run) > 1
            own = pool.submit([self._work(part, model, apart) for part in run])
            jobs += own
            pending += [_Result(self, task, own, i) for i in range(len(own))]
        return Running(task, pending, lambda: sum(job.reruns * job.work.units for job in jobs))

    def _work(self, part: Task[R], model: Sequence[Message | ray.ObjectRef], apart: bool) -> Work:
        """Return the call that answers a part.

        Args:
            part: of a task.
            model: its state and its base, as they were sent.
            apart: whether its result stays in the object store.
        """
        named = len(self._names) < _MOST_NAMES or part.name in self._names
        name = part.name if named else part.kind
        self._names.add(name)
        # Without the model, which is sent once for all parts.
        hollow = part.on(GlobalModel(AdapterState({}, {}), Base(), part.model.trainable))
        return Work(
            part.name,
            "run",
            (packed(hollow), *model, apart),
            {"name": name, "num_returns": 2 if apart else 1},
            limited=part.limited,
            clients=part.size,
            units=part.units,
        )

    def taken(self, job: Job) -> Any:
        """Wait for a job; return its result, and book the time that it took."""
        seconds, value = unpacked(self._opened().result(job))
        self._busy_s += seconds
        # It has been told: it need not stay until the round is over.
        job.value = None
        return value

    def joined(self, jobs: Sequence[Job]) -> Any:
        """Have an actor join what jobs keep in the object store.

        What was lost with the machine that held it is computed again.
        """
        pool = self._opened()
        hollow = jobs[0].work.args[0]
        for _ in range(ATTEMPTS):
            try:
                return self._fetched(hollow, [job.rest[0] for job in jobs])
            except (ObjectLostError, PartsLostError) as error:
                self._note(f"results were lost and are computed again: {error}")
                for job in jobs:
                    pool.again(job)
                for job in jobs:
                    pool.result(job)
        raise RunError(f"the same results were lost {ATTEMPTS} times one after another")

    def over(self, jobs: Sequence[Job]) -> None:
        """Let go of what jobs keep, and count the clients whose training was begun again."""
        self._retried += sum(job.reruns * job.work.clients for job in jobs)
        for job in jobs:
            job.rest = []

    def _fetched(self, task: Message, parts: list[ray.ObjectRef]) -> Any:
        work = Work("joining results", "join", (task, *parts), {"name": "join results"})
        (join,) = self._opened().submit([work], urgent=True)
        return unpacked(self._opened().result(join))

    def drop(self, jobs: Sequence[Job]) -> None:
        """Begin none of some jobs that still wait."""
        if self._pool is not None:
            self._pool.drop(jobs)

    def usage(self) -> Usage:
        """Return what the actors have done since `open`."""
        pool = self._opened()
        return Usage(pool.actors, self._busy_s, pool.losses, self._retried, pool.at_once)

    def close(self) -> None:
        """End the actors and give their resources back, unless they are others' too."""
        if self._crew is not None and not self._lent:
            self._crew.close()
        self._crew, self._pool = None, None
        self._shared, self._models = [], SentModels()


class _Result:
    """The result of one of the jobs of a run; with the last one comes what they keep, joined."""

    def __init__(self, engine: RayEngine, task: Task[Any], jobs: Sequence[Job], place: int) -> None:
        self._engine, self._task, self._jobs, self._place = engine, task, jobs, place

    def result(self) -> Any:
        told = self._engine.taken(self._jobs[self._place])
        if self._place + 1 < len(self._jobs):
            return told
        if len(self._jobs) > 1:
            told = self._task.joined([told, self._engine.joined(self._jobs)])
        self._engine.over(self._jobs)
        return told

    def cancel(self) -> None:
        self._engine.drop([self._jobs[self._place]])


class SentModels:
    """Models as they are sent: each state and each base is packed once."""

    def __init__(self) -> None:
        """Start with none."""
        self._state: tuple[tuple[str, str | None], Message | ray.ObjectRef] | None = None
        # The newest two: a round may start from another base than the one before was tested with.
        self._bases: dict[tuple[int, int], Message | ray.ObjectRef] = {}

    def sent(self, model: GlobalModel) -> tuple[Message | ray.ObjectRef, Message | ray.ObjectRef]:
        """Return the messages of a model's state and base, or their references."""
        seen = None if model.sent is None else model.sent.version
        if self._state is None or self._state[0] != (model.state.version, seen):
            self._state = (
                (model.state.version, seen),
                sent(model.state if seen is None else (model.state, model.sent)),
            )
        key = model.base.version
        if key not in self._bases:
            self._bases = {**dict([*self._bases.items()][-1:]), key: sent(model.base)}
        return self._state[1], self._bases[key]
