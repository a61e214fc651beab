"""The values that pass between the parts: numpy arrays and plain frozen records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal
from uuid import uuid4

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Stage = Literal["initiating", "heating", "cooling", "holding"]
Trainable = Literal["full", "adapter"]
Split = Literal["validation", "test"]
Device = Literal["cpu", "cuda"]
Frozen = Literal["a", "b"]
Absence = Literal["dropped", "late"]
# Times of a trace are whole microseconds.
TRACE_DIGITS = 6


@dataclass(frozen=True)
class Factors:
    """The LoRA factors of one module; its effective update is D = scale * b @ a.

    Attributes:
        a: (rank, d_in) float32.
        b: (d_out, rank) float32.
        scale: s, a positive number; it is part of the state, not of the rank.
    """

    a: FloatArray
    b: FloatArray
    scale: float

    @property
    def rank(self) -> int:
        """The inner dimension, 0 where the module has no adapter now."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class AdapterState:
    """What is trained and sent: factors by module name, other tensors by parameter name.

    In an adapter round `dense` holds the head; in a full-model round `factors` is empty and
    `dense` holds every weight.
    """

    factors: Mapping[str, Factors]
    dense: Mapping[str, FloatArray]
    # Unique to this value and its copies in other processes: engines send, and trainers load, each
    # version once. Arrays of a state are never written to.
    version: str = field(init=False, compare=False, repr=False, default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class Base:
    """The frozen base: the source's weights, or a replacement of them, plus merged updates.

    Attributes:
        root: 0 for the source's weights; each replacement of them counts one up.
        tensors: every base weight by parameter name, or None for the source's own.
        merges: how often updates have been merged into it since.
        merged: (d_out, d_in) by module, the sum of those updates.
    """

    root: int = 0
    tensors: Mapping[str, FloatArray] | None = None
    merges: int = 0
    merged: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def version(self) -> tuple[int, int]:
        """What tells two bases of a run apart."""
        return self.root, self.merges


@dataclass(frozen=True)
class GlobalModel:
    """The global model between rounds.

    `base` is not used while `trainable`, the kind of round that `state` belongs to, is `full`.
    `sent` is the state as clients see it after the download; None: exactly.
    """

    state: AdapterState
    base: Base
    trainable: Trainable
    sent: AdapterState | None = None


@dataclass(frozen=True)
class ModuleShape:
    """An adapted module's weight, d_out x d_in."""

    d_in: int
    d_out: int

    @property
    def max_rank(self) -> int:
        """The largest rank that an update of this module can have."""
        return min(self.d_in, self.d_out)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the schedule and the ledger need.

    Attributes:
        modules: the adapted modules by name, in model order.
        head_params: number of values in the densely trained head.
        total_params: number of values in the whole model, head included, adapters not.
        head: names of the head's tensors.
        obstacle: why a block's clients cannot be computed together, None where they can.
        linear_flops: mean work of one linear layer on one example, forward; 0 where unknown.
        activation_bytes: outputs of all linear layers for one example; 0 where unknown.
        logit_bytes: part of them that is a language model's logits; 0 for classifiers.
        checkpointed_bytes: memory of training for one example where layers are computed again in
            the backward pass; 0 where that is not possible, or unknown.
        notes: for the user, on how recipe and model were matched, one line each.
        tensors: shapes of all parameters of the model, by name, adapters not; empty: not known.
        stored_base_bytes: of the frozen base, where `model.dtype` says how it is kept; None: 4 a
            value.
    """

    modules: Mapping[str, ModuleShape]
    head_params: int
    total_params: int
    head: tuple[str, ...] = ()
    obstacle: str | None = None
    linear_flops: float = 0.0
    activation_bytes: int = 0
    logit_bytes: int = 0
    checkpointed_bytes: int = 0
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stored_base_bytes: int | None = None

    @property
    def base_params(self) -> int:
        """Number of values in the frozen base of an adapter round."""
        return self.total_params - self.head_params


@dataclass(frozen=True)
class Proposal:
    """A lower uniform rank that the schedule proposed, and the verdict on it.

    Attributes:
        verdict: `reheated` is target acceptance going up a step.
        energy_current, energy_proposed: validation losses (metropolis), else None.
        temperature, probability, draw: of the Metropolis step, else None.
        metric, target: the watched metric and the value it must hold (target), else None.
    """

    rank: int
    verdict: Literal["accepted", "rejected", "reheated"]
    energy_current: float | None = None
    energy_proposed: float | None = None
    temperature: float | None = None
    probability: float | None = None
    draw: float | None = None
    metric: float | None = None
    target: float | None = None


@dataclass(frozen=True)
class RoundPlan:
    """What one communication round does, decided before it starts.

    Attributes:
        round: index from 0.
        trainable: `full` trains and sends every weight, `adapter` the factors and the head.
        rank: uniform rank whose parameter count is the round's budget (0 in a full round).
        proximal_weight: mu of the proximal term, 0 for none.
    """

    round: int
    stage: Stage
    trainable: Trainable
    rank: int
    proximal_weight: float
    proposal: Proposal | None = None


@dataclass(frozen=True)
class LocalSettings:
    """A client's own settings of local training; None: as all clients have it.

    Attributes:
        lr: local learning rate.
        steps: number of local steps.
        batch_size: examples a step.
    """

    lr: float | None = None
    steps: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class LocalPlan:
    """What the clients of a round need to know beside the state they train from.

    Attributes:
        lr: local learning rate; the mean of all clients where they have their own.
        frozen: the factor of every module that is not trained, if any.
        tolerant: whether a client that raises is left out, instead of ending the run.
        own: settings of clients that differ.
    """

    round: int
    trainable: Trainable
    lr: float
    proximal_weight: float
    frozen: Frozen | None = None
    tolerant: bool = False
    own: Mapping[int, LocalSettings] = field(default_factory=dict)

    def lr_of(self, client: int) -> float:
        """Return a client's learning rate."""
        own = self.own.get(client)
        return self.lr if own is None or own.lr is None else own.lr

    def of(self, clients: Iterable[int]) -> LocalPlan:
        """Return the same with the own settings of some clients alone."""
        if not self.own:
            return self
        return replace(self, own={k: self.own[k] for k in clients if k in self.own})


@dataclass(frozen=True)
class ClientReport:
    """One client's training, beside the state that it sends back.

    Attributes:
        client: client id, from 0.
        examples: number of training examples the client holds.
        train_loss: mean loss over its local steps (nan where it failed).
        seconds: its local training time.
        error: why it failed.
        trace: its traceback where training raised.
        note: for the user, beside an error.
        absent: why its update is not used, by the simulated clock: the client left (`dropped`) or
            came too late (`late`).
        personal: B by module where the client keeps its own; the simulation keeps it for it.
        steps: number of its local steps.
        memory: arrays by name that the client keeps for its objective; the simulation keeps them.
        message: arrays by name that it sends for its objective beside its state.
        tokens: of its batches, padding left out; 0 but in language models.
        peak_mb: largest memory of the process that trained it so far, 10^6 bytes; likewise.
    """

    client: int
    examples: int
    train_loss: float
    seconds: float
    error: str | None = None
    trace: str | None = None
    note: str | None = None
    absent: Absence | None = None
    personal: Mapping[str, FloatArray] | None = None
    steps: int = 0
    memory: Mapping[str, FloatArray] | None = None
    message: Mapping[str, FloatArray] | None = None
    tokens: int = 0
    peak_mb: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether the client's state enters the aggregate."""
        return self.error is None and self.absent is None


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for n examples, in their order.

    Attributes:
        labels: (n,) true class; -1 for language modelling.
        losses: (n,) cross entropy summed over an example's predictions, nats.
        correct: (n,) number of an example's correct predictions.
        predicted: (n,) number of an example's predictions: 1, or its tokens.
        classes: (n,) predicted class; -1 for language modelling.
        probabilities: (n, classes), None where there are too many classes to send.
    """

    labels: npt.NDArray[np.int64]
    losses: FloatArray
    correct: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    probabilities: FloatArray | None = None


@dataclass(frozen=True)
class ClientScore:
    """Accuracy and mean cross entropy (nats) of a model on one client's own held-out examples."""

    client: int
    examples: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class AvailabilityTrace:
    """The times at which clients can be reached, in seconds of the simulated clock.

    (n,) rows: `client`, a client id, can be reached from `start_s` until just before `end_s`.
    """

    client: npt.NDArray[np.int64]
    start_s: npt.NDArray[np.float64]
    end_s: npt.NDArray[np.float64]


@dataclass(frozen=True)
class DeviceFacts:
    """The facts about clients and their devices that the data give.

    Attributes:
        sizes: (clients,) number of training examples.
        columns: (clients,) numbers by name of a data column.
        trace: when clients can be reached; None: always.
    """

    sizes: npt.NDArray[np.int64]
    columns: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    trace: AvailabilityTrace | None = None
