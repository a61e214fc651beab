"""Fakes that Ray workers import too: a trainer of a few numbers whose results are known by hand.

Client k holds k + 1 examples. Its update is the state it received with `step(k, round, base)` added
to every value, so that the mean over a cohort is the start plus the weighted mean of the steps.
Under SCAFFOLD it is one step along the corrected gradient: less lr * (c - c_k).
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.data.examples import Examples
from rayfed_lora.data.workload import Workload
from rayfed_lora.engines.factory import in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.errors import BlockMemoryError
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Population, Running, answer, runs
from rayfed_lora.tasks.messages import Evaluate, Export, TestClients, Train
from rayfed_lora.tasks.training import BlockUpdate, Starts, attributed, trained
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientReport,
    ClientScore,
    Factors,
    FloatArray,
    Frozen,
    GlobalModel,
    LocalPlan,
    ModelShape,
    ModuleShape,
    Predictions,
    Split,
    Trainable,
)

TEST_ROWS = 5
VALIDATION_ROWS = 3
# 24 + 12 + 5 + 6 = 47 values in all, 6 of them the head's, 41 in the frozen base.
WEIGHTS = {"embed": (5,), "q.weight": (6, 4), "v.weight": (4, 3), "head": (2, 3)}
SHAPE = ModelShape(
    modules={"q": ModuleShape(d_in=4, d_out=6), "v": ModuleShape(d_in=3, d_out=4)},
    head_params=6,
    total_params=47,
    head=("head",),
    tensors=WEIGHTS,
)
RECIPE: dict[str, Any] = {
    "name": "fake",
    "seed": 3,
    "data": {"partition": {"clients": 6, "kind": "iid"}},
    "model": {"config": {"architecture": "vit"}},
    "adapter": {"alpha": 6.0},
    "annealing": {
        "initiating": {"rounds": 1},
        "heating": {"rounds": 2, "rank": 3},
        "cooling": {"rounds": 2, "rank": 1, "shape": "linear"},
        "holding": {"rounds": 1},
    },
    "clients": {"per_round": 3},
    "evaluation": {"batch_size": 2},
    "runtime": {"executor": "local", "client_actors": 1, "gpus_per_actor": 0, "device": "cpu"},
}


def make_recipe(**overrides: Any) -> Recipe:
    """Return a validated recipe of six rounds; `annealing__mode="full"` sets `annealing.mode`."""
    return load_recipe(RECIPE, {key.replace("__", "."): v for key, v in overrides.items()})


def step(client: int, round_index: int, base: Base) -> float:
    """Return what a client adds to every value: client + round, and an eighth for each new base."""
    return client + round_index + (base.root + base.merges) / 8


def variates(task: Train, client: int) -> float:
    """Return c - c_k, the same in every value; 0 where the objective shares nothing."""
    shared, own = task.remembered.shared, task.remembered.memory.get(client)
    return sum(
        float(c.flat[0]) - (0.0 if own is None else float(own[n].flat[0]))
        for n, c in [*shared.items()][:1]
    )


def initial(name: str) -> FloatArray:
    """Return a weight as the source has it: 0, 1/8, 2/8, ..."""
    size = math.prod(WEIGHTS[name])
    return (np.arange(size, dtype=np.float32) / 8).reshape(WEIGHTS[name])


@dataclass(frozen=True)
class Behaviour:
    """What goes wrong, by (client, round).

    Attributes:
        failing: the update that comes is not a number.
        raising: training raises ValueError.
        sleep_s: seconds that a client sleeps in each round.
        dying: the worker's process kills itself, as long as `marker` is there; it takes it away.
        marker: path of an empty file, needed by `dying`.
        dying_always: likewise without a marker, each time.
        stuck: training takes an hour, as long as `marker` is there; it takes it away.
        together: how many clients fit into memory together; None: any number.
        rows_together: how many rows of a test fit into memory together; None: any number.
        tests: what is predicted: the class, with `probabilities`, or the tokens of `texts`.
    """

    failing: frozenset[tuple[int, int]] = frozenset()
    raising: frozenset[tuple[int, int]] = frozenset()
    sleep_s: Mapping[int, float] = field(default_factory=dict)
    dying: frozenset[tuple[int, int]] = frozenset()
    marker: str = ""
    dying_always: frozenset[tuple[int, int]] = frozenset()
    stuck: frozenset[tuple[int, int]] = frozenset()
    together: int | None = None
    rows_together: int | None = None
    tests: Literal["classes", "probabilities", "texts"] = "classes"


def every_round(*clients: int) -> frozenset[tuple[int, int]]:
    """Return the pairs of some clients with the first hundred rounds."""
    return frozenset((client, t) for client in clients for t in range(100))


class FakeTrainer:
    """Adds known steps; its metrics are smooth functions of the effective weights."""

    def __init__(self, behaviour: Behaviour, device: str) -> None:
        self._behaviour = behaviour
        self._device = device

    def shape(self) -> ModelShape:
        return SHAPE

    def run(self, task: Any) -> Any:
        if isinstance(task, Train):
            return trained(task, partial(self._train_block, task))
        if isinstance(task, Evaluate):
            return tuple(self._evaluate(task.split, rows, task.model) for rows in task.shards)
        if isinstance(task, TestClients):
            return self._test_clients(task)
        if isinstance(task, Export):
            return self._export(task.model)
        names = WEIGHTS if task.trainable == "full" else SHAPE.head
        return {name: initial(name) for name in names}

    def _train_block(
        self, task: Train, clients: Sequence[int], starts: Sequence[AdapterState]
    ) -> BlockUpdate:
        if self._behaviour.together is not None and len(clients) > self._behaviour.together:
            raise BlockMemoryError(f"{len(clients)} clients do not fit")
        reports, states = [], []
        for client, start in zip(clients, starts, strict=True):
            with attributed(client, task.plan.round):
                drift = task.plan.lr * variates(task, client)
                report, state = self._train_client(client, start, task.model.base, task.plan, drift)
            reports.append(report)
            states += [] if state is None else [state]
        return BlockUpdate(tuple(reports), states)

    def _train_client(
        self, client: int, start: AdapterState, base: Base, plan: LocalPlan, drift: float
    ) -> tuple[ClientReport, AdapterState | None]:
        b, t = self._behaviour, plan.round
        time.sleep(b.sleep_s.get(client, 0.0))
        if (client, t) in b.dying_always or ((client, t) in b.dying and _taken(b.marker)):
            os.kill(os.getpid(), signal.SIGKILL)
        if (client, t) in b.stuck and _taken(b.marker):
            time.sleep(3600)
        if (client, t) in b.raising:
            raise ValueError(f"the fake client {client} was told to raise")
        if (client, t) in b.failing:
            reason = "loss is nan in local step 1 of 1"
            return ClientReport(client, client + 1, math.nan, 0.0, reason), None
        state = moved(start, step(client, t, base) - drift, plan.frozen)
        seconds = b.sleep_s.get(client, 0.0)
        return ClientReport(client, client + 1, float(client), seconds, steps=1), state

    def _evaluate(self, split: Split, rows: slice, model: GlobalModel) -> Predictions:
        size = TEST_ROWS if split == "test" else VALIDATION_ROWS
        most, count = self._behaviour.rows_together, len(np.arange(size)[rows])
        if most is not None and count > most:
            raise BlockMemoryError(f"{count} rows do not fit")
        wave = np.sin(energy(model.state, model.base, model.trainable) + np.arange(size)[rows])
        right = (wave < 0).astype(np.int64)
        labels = np.ones(len(wave), np.int64)
        if self._behaviour.tests == "texts":
            labels = -labels
        probabilities = None
        if self._behaviour.tests == "probabilities":
            labels = np.arange(size)[rows] % 2
            probabilities = np.stack([wave, -wave], axis=1).astype(np.float32)
        return Predictions(
            labels=labels,
            losses=(1 + 0.1 * wave).astype(np.float32),
            correct=right,
            predicted=np.ones(len(wave), np.int64),
            classes=right,
            probabilities=probabilities,
        )

    def _test_clients(self, task: TestClients) -> tuple[ClientScore, ...]:
        starts, model = Starts(task), task.model
        most = self._behaviour.together
        if most is not None and len(task.clients) > most:
            raise BlockMemoryError(f"{len(task.clients)} clients do not fit")
        energies = [energy(starts.of(k), model.base, model.trainable) for k in task.clients]
        return tuple(
            ClientScore(client, client + 1, abs(float(np.sin(e + client))), e)
            for client, e in zip(task.clients, energies, strict=True)
        )

    def _export(self, model: GlobalModel) -> dict[str, bytes]:
        found = energy(model.state, model.base, model.trainable)
        facts = {"device": self._device, "energy": found}
        facts["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        config = json.dumps({"base_model_name_or_path": "none"}).encode()
        adapter = {"fake.json": json.dumps(facts).encode(), "adapter_config.json": config}
        adapter["adapter_model.safetensors"] = b""
        return {f"adapter/{name}": content for name, content in adapter.items()}


def _taken(marker: str) -> bool:
    """Take the marker away; return whether it was there."""
    try:
        Path(marker).unlink()
    except FileNotFoundError:
        return False
    return True


def moved(state: AdapterState, by: float, frozen: Frozen | None = None) -> AdapterState:
    """Return the state with `by` added to every value that is not frozen."""
    move = np.float32(by)
    factors = {
        n: Factors(f.a + move * (frozen != "a"), f.b + move * (frozen != "b"), f.scale)
        for n, f in state.factors.items()
    }
    return AdapterState(factors, {name: tensor + move for name, tensor in state.dense.items()})


def effective(state: AdapterState, base: Base, trainable: Trainable) -> dict[str, np.ndarray]:
    """Return every weight of the global model densely, in float64; needs no rule but D = s b a."""
    source = {name: initial(name) for name in WEIGHTS} if base.tensors is None else base.tensors
    under = {} if trainable == "full" else source
    weights = {name: tensor.astype(np.float64) for name, tensor in {**under, **state.dense}.items()}
    if trainable == "full":
        return weights
    for name, update in base.merged.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + update
    for name, f in state.factors.items():
        product = np.einsum("or,ri->oi", f.b.astype(np.float64), f.a.astype(np.float64))
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + f.scale * product
    return weights


def energy(state: AdapterState, base: Base, trainable: Trainable) -> float:
    """Return the sum over the weights, by name, of their Frobenius norms."""
    weights = sorted(effective(state, base, trainable).items())
    return float(sum(np.sqrt(np.sum(weight * weight)) for _, weight in weights))


@dataclass(frozen=True)
class FakeFactory:
    """Makes fake trainers; travels to Ray's workers.

    Attributes:
        behaviour: of its trainers.
        side: height and width of the images; 64 makes a workload that Ray keeps in shared memory.
        start_s: seconds that a process takes to start, where this travels to it.
        log: path of a file; a line is added each time a workload is made.
        dying_in: workload or trainer: its making kills the process, as long as the behaviour's
            `marker` is there; without a marker each time.
    """

    behaviour: Behaviour = field(default_factory=Behaviour)
    side: int = 2
    start_s: float = 0.0
    log: str | None = None
    dying_in: str = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        time.sleep(self.start_s)

    def load(self, recipe: Recipe) -> None:
        """Import nothing: the fakes need neither torch nor transformers."""

    def workload(self, recipe: Recipe) -> Workload:
        self._die("workload")
        if self.log is not None:
            with Path(self.log).open("a") as log:
                log.write("workload\n")
        clients = recipe.data.partition.clients
        offsets = np.cumsum([0, *range(1, clients + 1)])
        return Workload(
            train=_examples(int(offsets[-1]), self.side),
            validation=_examples(VALIDATION_ROWS if recipe.validation_fraction else 0, self.side),
            test=_examples(TEST_ROWS, self.side),
            clients=ClientTable(np.arange(offsets[-1]), offsets),
            label_names=("no", "yes"),
            config={"model_type": "vit"},
        )

    def weights(self, recipe: Recipe, workload: Workload) -> dict[str, FloatArray]:
        return {name: initial(name) for name in WEIGHTS}

    def trainer(
        self, recipe: Recipe, workload: Workload, weights: Mapping[str, FloatArray], device: str
    ) -> FakeTrainer:
        self._die("trainer")
        return FakeTrainer(self.behaviour, device)

    def _die(self, place: str) -> None:
        marker = self.behaviour.marker
        if self.dying_in == place and (not marker or _taken(marker)):
            os.kill(os.getpid(), signal.SIGKILL)


def _examples(rows: int, side: int) -> Examples:
    pixels = np.zeros((rows, 1, side, side), np.float32)
    return Examples.of({"pixel_values": pixels}, np.zeros(rows, np.int64))


def spoilt(examples: Examples, column: str, place: Any, value: float) -> Examples:
    """Return examples with one value put at a place of a column of inputs, or of the labels."""
    arrays = {name: values.copy() for name, values in examples.inputs.items()}
    arrays["labels"] = examples.labels.copy()
    arrays[column][place] = value
    labels = arrays.pop("labels")
    return Examples.of(arrays, labels)


def local_engine(recipe: Recipe, behaviour: Behaviour | None = None) -> LocalEngine:
    """Return an engine in this process, not yet opened."""
    factory = FakeFactory(behaviour or Behaviour())
    return LocalEngine(lambda: in_process(recipe, factory, "cpu"))


class FakeEngine:
    """All that an engine has to do: parts are answered in order, when they are asked for."""

    def __init__(self, recipe: Recipe, behaviour: Behaviour | None = None) -> None:
        self._recipe, self._factory = recipe, FakeFactory(behaviour or Behaviour())

    def open(self) -> Population:
        (self._trainer,), population = in_process(self._recipe, self._factory, "cpu")
        return population

    def submit(self, task: Any) -> Running[Any]:
        pending = [_Asked(self._trainer, run) for run in runs(task)]
        return Running(task, deque(pending))

    def close(self) -> None:
        """Nothing was taken."""


class _Asked:
    def __init__(self, trainer: Any, parts: Sequence[Any]) -> None:
        self._trainer, self._parts = trainer, parts

    def result(self) -> Any:
        results = [answer(self._trainer, part) for part in self._parts]
        return self._parts[0].joined(results)

    def cancel(self) -> None:
        """It begins when it is asked for."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test catches it."""


class KilledEngine:
    """A local engine whose process 'is killed' when one client's update of a round is due."""

    def __init__(self, recipe: Recipe, round_index: int, position: int) -> None:
        """Kill in round `round_index` before the update at `position` of the cohort comes."""
        self._inner = local_engine(recipe)
        self._at = (round_index, position)
        self.closed = False

    def open(self) -> Population:
        return self._inner.open()

    def submit(self, task: Any) -> Running[Any]:
        running = self._inner.submit(task)
        if not isinstance(task, Train) or task.plan.round != self._at[0]:
            return running
        taken, parts = 0, []
        for part, pending in zip(task.parts(), running.pending, strict=True):
            taken += part.size
            parts.append(_Killing() if taken > self._at[1] else pending)
        return Running(task, deque(parts))

    def close(self) -> None:
        self.closed = True
        self._inner.close()


class _Killing:
    def result(self) -> Any:
        raise Killed

    def cancel(self) -> None:
        """It never began."""
