"""An objective of local training as one object: its facts and its hooks.

A built-in objective is a file of `built_in`; a plug-in's is a decorated class. Hooks get tensors or
arrays by name: `A of <module>`, `B of <module>`, and the parameters that are trained densely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from rayfed_lora.errors import PluginError, RunError
from rayfed_lora.lora.stacked import A, B, named
from rayfed_lora.plugins.tables import OBJECTIVES
from rayfed_lora.types import AdapterState, FloatArray, Frozen

Arrays = Mapping[str, FloatArray]
Shapes = Mapping[str, tuple[int, ...]]
# One tensor for each trained one, of its name and shape; or tensors of fixed shapes, by name.
Declared = Literal["trained"] | Shapes
Part = Literal["memory", "message", "shared"]
_HOOKS = ("loss", "gradient", "after", "server", "model")


@dataclass(frozen=True)
class LocalStep:
    """One optimiser step of some clients, between the gradient and the step.

    All values are torch tensors whose first dimension is the client; the mappings cannot be
    changed, `gradients` is changed in place.

    Attributes:
        parameters: present values; not to be changed.
        gradients: of the loss and the proximal term; without tensors that have none.
        received: values at the start of the round.
        memory: of the clients; 0 for those that have none yet.
        shared: of the server.
        rates: local learning rate of each client.
        step: index of the local step, from 0.
    """

    parameters: Mapping[str, Any]
    gradients: Mapping[str, Any]
    received: Mapping[str, Any]
    memory: Mapping[str, Any]
    shared: Mapping[str, Any]
    rates: tuple[float, ...]
    step: int

    @property
    def lr(self) -> float:
        """The local learning rate of all clients.

        Raises:
            RunError: they have their own.
        """
        if any(rate != self.rates[0] for rate in self.rates):
            raise RunError(
                "local.lr: expected one learning rate, the clients have their own: use local.rates,"
                " one a client"
            )
        return self.rates[0]


@dataclass(frozen=True)
class Done:
    """One client's finished training, in read-only float32 arrays.

    Attributes:
        client: id, from 0.
        round: index, from 0.
        start, end: the trained tensors before and after the local steps.
        memory: of before the round; 0 where the client had none.
        shared: of the server.
        steps: number of local steps, >= 1.
        lr: local learning rate.
        examples: number of the client's training examples.
    """

    client: int
    round: int
    start: Arrays
    end: Arrays
    memory: Arrays
    shared: Arrays
    steps: int
    lr: float
    examples: int


@dataclass(frozen=True)
class ModelStep:
    """What the server has after a round's aggregation, in read-only float32 arrays.

    Attributes:
        start: the trained tensors that the clients started from.
        mean: the same after the rule's step, the weighted mean of the clients' tensors.
        shared: of before the round.
        arrived: number of clients whose update was used, >= 1.
        clients: number of all clients of the run.
        round: index, from 0.
    """

    start: Arrays
    mean: Arrays
    shared: Arrays
    arrived: int
    clients: int
    round: int


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What local training minimises, and what clients and server remember for it.

    Attributes:
        name: the value of `clients.objective`.
        source: arXiv number.
        summary: one line for the documentation of `clients.objective`.
        target: the decorated class.
        options: its options.
        memory, message, shared: tensors that a client keeps between its rounds, sends up beside
            its update, and is sent beside the model; with a hook `model`, what is shared stays on
            the server.
        plain_sgd: whether `(start - end) / (steps * lr)` has to be the mean gradient: sgd without
            momentum, no clipping.
    """

    name: str
    source: str
    summary: str
    target: type
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: Declared = field(default_factory=dict)
    message: Declared = field(default_factory=dict)
    shared: Declared = field(default_factory=dict)
    plain_sgd: bool = False

    def with_options(self, options: Mapping[str, Any]) -> Objective:
        """Return the objective with options of its class."""
        return replace(self, options=options)

    @cached_property
    def _hooks(self) -> Any:
        return self.target(**self.options)

    def has(self, name: str) -> bool:
        """Return whether it has a hook."""
        return hasattr(self.target, name)

    def hook(self, name: str) -> Callable[..., Any] | None:
        """Return one of the hooks; None where it has none."""
        found: Callable[..., Any] | None = getattr(self._hooks, name, None)
        return found

    @property
    def steps_model(self) -> bool:
        """Whether it steps the server's model; what is shared then stays on the server."""
        return self.has("model")

    @property
    def sends(self) -> bool:
        """Whether anything is sent beside the update and the model."""
        return bool(self.message) or (bool(self.shared) and not self.steps_model)

    @property
    def one_rank(self) -> bool:
        """Whether what it keeps or sends has the shapes of the trained tensors."""
        return "trained" in (self.memory, self.message, self.shared)

    def shapes(self, part: Part, trained: Shapes) -> Shapes:
        """Return the shapes of what it keeps or sends, given those of the trained tensors."""
        declared: Declared = getattr(self, part)
        return trained if declared == "trained" else declared

    def values(self, part: Part, trained: int) -> int:
        """Return the number of values that it keeps or sends, given that of the trained ones."""
        if part == "shared" and self.steps_model:
            return 0
        declared: Declared = getattr(self, part)
        if declared == "trained":
            return trained
        return sum(int(np.prod(shape)) for shape in declared.values())

    def zeros(self, part: Part, trained: Shapes) -> dict[str, FloatArray]:
        """Return what it keeps or shares before its first round, in the order of names."""
        return {n: np.zeros(s, np.float32) for n, s in sorted(self.shapes(part, trained).items())}


def trained_tensors(state: AdapterState, frozen: Frozen | None) -> dict[str, FloatArray]:
    """Return the tensors of a state that clients train, by name; empty ones are left out."""
    prefix = {"a": A, "b": B, None: None}[frozen]
    return {
        name: tensor
        for name, tensor in named(state).items()
        if tensor.size > 0 and (prefix is None or not name.startswith(prefix))
    }


def trained_shapes(state: AdapterState, frozen: Frozen | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `trained_tensors`."""
    return {name: tensor.shape for name, tensor in trained_tensors(state, frozen).items()}


def objective(
    name: str | None = None,
    *,
    memory: Declared | None = None,
    message: Declared | None = None,
    shared: Declared | None = None,
    plain_sgd: bool = False,
    summary: str | None = None,
    source: str = "",
) -> Callable[[type], type]:
    """Register an objective of local training: `@objective()` on a frozen dataclass.

    The fields of the class are its options: keys beside `clients.objective.name`. Its methods are
    hooks, each optional:

    * `loss(logits, labels)`: (n, classes) float32 and (n,) int64 torch tensors -> (n,) losses, in
      place of the cross entropy; classifiers only.
    * `gradient(local)`: changes the gradients of a `LocalStep` in place, after the proximal term,
      before clipping and the optimiser's step.
    * `after(done)`: from one client's `Done` to (memory, message), arrays by name.
    * `server(shared, messages, clients)`: from the shared arrays, the messages of this round's
      clients, (n, ...) by name in the order of the cohort, and the number of all clients, to the
      shared arrays of the next round. They begin as zeros.
    * `model(step)`, in place of `server`: from a `ModelStep` to (model, shared), the trained
      tensors of the next model, in place of the mean, and the next shared arrays. These stay on the
      server: clients do not get them, and they are not billed.

    A client's memory is kept in the run's state and in checkpoints: a client that failed, left or
    came too late keeps the old one. What is declared is what has to be returned; messages and
    shared arrays are billed.

    Args:
        name: value of `clients.objective`; default: the class's, with hyphens.
        memory: that `after` returns: "trained" for a tensor for each trained one, of its name and
            shape; or shapes by name; default: nothing.
        message: likewise, what a client sends up.
        shared: likewise, what `server` returns and each client is sent.
        plain_sgd: as of `Objective`.
        summary: one line; default: the first one of the docstring.
        source: arXiv number.

    Raises:
        PluginError: the name is taken, an option is not typed, or a declared part has no hook that
            makes it.
    """

    def register(target: type) -> type:
        declared = {"memory": memory, "message": message, "shared": shared}
        _check_hooks(target, declared)

        def value(own: str) -> Objective:
            return Objective(
                name=own,
                source=source,
                summary=summary or (target.__doc__ or "").strip().partition("\n")[0],
                target=target,
                plain_sgd=plain_sgd,
                **{part: shapes or {} for part, shapes in declared.items()},  # type: ignore[arg-type]
            )

        found: type = OBJECTIVES.add(target, name, value=value, bind=Objective.with_options)
        return found

    return register


def _check_hooks(target: type, declared: Mapping[str, Declared | None]) -> None:
    where = f"objective {target.__module__}:{target.__qualname__}"
    if not isinstance(target, type):
        raise PluginError(f"{where}: expected a class whose methods are hooks")
    for part, shapes in declared.items():
        hooks = ("server", "model") if part == "shared" else ("after",)
        if shapes is not None and not any(hasattr(target, hook) for hook in hooks):
            raise PluginError(
                f"{where}: declares {part}, expected a method {hooks[0]!r} that returns it"
            )
        if isinstance(shapes, str) and shapes != "trained":
            raise PluginError(
                f"{where}: {part}: expected 'trained' or shapes by name, got {shapes!r}"
            )
    if hasattr(target, "server") and hasattr(target, "model"):
        raise PluginError(f"{where}: expected a method 'server' or 'model', got both")
    if hasattr(target, "server") and declared["shared"] is None:
        raise PluginError(f"{where}: has a method 'server', expected shared to be declared")
    public = [
        key for key in vars(target) if not key.startswith("_") and callable(vars(target)[key])
    ]
    if public and not set(public) & set(_HOOKS):
        raise PluginError(f"{where}: expected a method named {', '.join(_HOOKS)}, got {public}")
