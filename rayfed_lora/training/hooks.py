"""The hooks of an objective in local training: the loss, and the gradients of a group of clients.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch.nn import functional

from rayfed_lora.errors import RunError
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.objectives.objective import Arrays, LocalStep
from rayfed_lora.objectives.remembered import Remembered
from rayfed_lora.types import LocalPlan

# (n, classes) logits and (n,) labels -> (n,) losses.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_cross_entropy = partial(functional.cross_entropy, reduction="none")


class LocalHooks:
    """The objective of a group of clients; clients that finish leave from its end."""

    def __init__(
        self,
        remembered: Remembered,
        model: AdaptedModel,
        clients: Sequence[int],
        plan: LocalPlan,
    ) -> None:
        """Take a loaded group, before its first step.

        Args:
            remembered: the objective and what it works with.
            model: loaded with the group.
            clients: in the order of the group.
            plan: the round.
        """
        objective = remembered.objective
        self._where = f"objective {remembered.name!r} in round {plan.round + 1}"
        self._model, self._rates = model, tuple(map(plan.lr_of, clients))
        own_loss, self._gradient = objective.hook("loss"), objective.hook("gradient")
        self.loss: Loss = _cross_entropy if own_loss is None else partial(self._own_loss, own_loss)
        self._memory: dict[str, torch.Tensor] = {}
        self._shared: dict[str, torch.Tensor] = {}
        if self.correcting:
            trained = self._shapes()
            own = [remembered.memory_of(client, trained) for client in clients]
            tensor = model.resident.tensor
            self._memory = {n: tensor(np.stack([each[n] for each in own])) for n in own[0]}
            self._shared = self._for_all(remembered.shared, len(clients))

    @property
    def correcting(self) -> bool:
        """Whether the objective has a hook for gradients."""
        return self._gradient is not None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one client's trained tensors, by name."""
        model = self._model
        each = zip(model.trained_names, model.trained, model.without_client, strict=True)
        return {name: tuple(p.shape if plain else p.shape[1:]) for name, p, plain in each}

    def _for_all(self, arrays: Arrays, clients: int) -> dict[str, torch.Tensor]:
        found = {name: self._model.resident.tensor(np.array(a)) for name, a in arrays.items()}
        return {name: t.expand(clients, *t.shape) for name, t in found.items()}

    def correct(self, received: Sequence[torch.Tensor], step: int) -> None:
        """Let the objective change the gradients of a step in place.

        Args:
            received: (clients that the group began with, ...) the trained tensors at its start.
            step: index of the local step.

        Raises:
            RunError: the hook returned a value: it may have made gradients of its own.
        """
        model = self._model
        if self._gradient is None:
            return
        parameters, gradients, anchors = {}, {}, {}
        each = zip(model.trained_names, model.trained, received, model.without_client, strict=True)
        clients = 1
        for name, parameter, anchor, plain in each:
            values, gradient = parameter.detach(), parameter.grad
            clients = 1 if plain else len(values)
            parameters[name] = values[None] if plain else values
            anchors[name] = anchor[None] if plain else anchor[:clients]
            if gradient is not None:
                gradients[name] = gradient[None] if plain else gradient
        local = LocalStep(
            parameters=MappingProxyType(parameters),
            gradients=MappingProxyType(gradients),
            received=MappingProxyType(anchors),
            memory=_first(self._memory, clients),
            shared=_first(self._shared, clients),
            rates=self._rates[:clients],
            step=step,
        )
        with torch.no_grad():
            found = self._gradient(local)
        if found is not None:
            raise RunError(
                f"{self._where}: expected gradient() to change local.gradients in place and to"
                f" return nothing, got {type(found).__name__}"
            )

    def _own_loss(
        self,
        loss: Callable[..., torch.Tensor],
        logits: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        found = loss(logits, labels)
        right = isinstance(found, torch.Tensor) and found.shape == labels.shape
        if not right or not found.is_floating_point():
            got = f"{found.dtype} of {tuple(found.shape)}" if hasattr(found, "dtype") else found
            raise RunError(
                f"{self._where}: expected loss() to return floats of shape"
                f" {tuple(labels.shape)}, a loss for each example, got {got}"
            )
        return found


def _first(tensors: Mapping[str, torch.Tensor], clients: int) -> Mapping[str, torch.Tensor]:
    return MappingProxyType({name: tensor[:clients] for name, tensor in tensors.items()})
