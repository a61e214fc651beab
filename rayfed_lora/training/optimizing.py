"""Optimisers and gradients of a group of clients: the first dimension of a tensor is the client.

Source: local SGD as in FedAvg, arXiv:1602.05629; proximal term: FedProx, arXiv:1812.06127, eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rayfed_lora.errors import RunError
from rayfed_lora.plugins.tables import OPTIMIZERS
from rayfed_lora.recipe.clients import Clients


class OwnRates:
    """An optimiser for each client of a group, with the client's own learning rate.

    Each works on the client's slices of the parameters, so that a client's step has the bits of
    its step alone, whatever the optimiser.
    """

    def __init__(
        self, parameters: list[torch.Tensor], make: Callable[..., Any], rates: Sequence[float]
    ) -> None:
        """Make the optimisers.

        Args:
            parameters: of the group; the first dimension of each is the client.
            make: returns the optimiser of some parameters at a learning rate.
            rates: of the clients.
        """
        self._parameters = parameters
        self._slices = [[p.detach()[k : k + 1] for p in parameters] for k in range(len(rates))]
        self._places = [[one.data_ptr() for one in own] for own in self._slices]
        own_rates = zip(self._slices, rates, strict=True)
        self._optimizers = [make(own, lr) for own, lr in own_rates]

    def step(self) -> None:
        """Step each client's slices along their gradients.

        Raises:
            RunError: the optimiser puts other tensors in the place of the parameters.
        """
        for k, (own, optimizer) in enumerate(zip(self._slices, self._optimizers, strict=True)):
            for one, parameter in zip(own, self._parameters, strict=True):
                one.grad = None if parameter.grad is None else parameter.grad[k : k + 1]
            optimizer.step()
            if [one.data_ptr() for one in own] != self._places[k]:
                raise RunError(
                    "clients.optimizer: where clients have learning rates of their own, expected an"
                    " optimiser that changes parameters in place, got one that replaces them"
                )

    def keep(self, clients: int) -> None:
        """Keep only the first clients of the group."""
        self._slices, self._optimizers = self._slices[:clients], self._optimizers[:clients]


def fresh_optimizer(
    parameters: list[torch.Tensor], settings: Clients, rates: Sequence[float]
) -> torch.optim.Optimizer | OwnRates | None:
    """Return a fresh optimiser of a group of clients with these learning rates.

    None where nothing is trained (rank 0 and no head).
    """
    if not parameters:
        return None
    chosen = settings.optimizer
    make = OPTIMIZERS.with_options(chosen.name, chosen.options)
    if any(lr != rates[0] for lr in rates):
        return OwnRates(parameters, make, rates)
    made: torch.optim.Optimizer = make(parameters, rates[0])
    return made


def add_proximal_gradient(
    parameters: list[torch.Tensor], received: list[torch.Tensor], weight: float
) -> None:
    """Add the gradient of (weight / 2) * ||theta - theta_received||^2, weight >= 0.

    `received` is of all clients that the group began with; it may be empty if the weight is 0.
    """
    for parameter, anchor in zip(parameters, received, strict=False):
        if parameter.grad is not None:
            # Clients that have left the group are not in the parameter any more.
            here = anchor[: len(parameter)] if parameter.dim() > 0 else anchor
            parameter.grad.add_(parameter.detach() - here, alpha=weight)


def clip_by_client(parameters: Sequence[torch.Tensor], limit: float, clients: int) -> None:
    """Scale each client's gradient, over all its parameters, to a norm of at most `limit` > 0.

    The formula is that of `torch.nn.utils.clip_grad_norm_`, client by client. The first dimension
    of each parameter is the client; with one client it need not be.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    each = [torch.linalg.vector_norm(g.reshape(clients, -1), dim=1) for g in gradients]
    norms = torch.linalg.vector_norm(torch.stack(each), dim=0)
    shares = (limit / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        by_client = shares.view(clients, *[1] * (gradient.dim() - 1))
        gradient.mul_(by_client if gradient.dim() > 0 else by_client[0])


def cut_to(optimizer: torch.optim.Optimizer | OwnRates | None, clients: int) -> None:
    """Cut an optimiser's state to the first clients of the group, as its parameters were cut."""
    if isinstance(optimizer, OwnRates):
        optimizer.keep(clients)
        return
    for state in () if optimizer is None else optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[name] = value[:clients]
