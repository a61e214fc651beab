"""Optimisers and gradients of a group of clients: the first dimension of a tensor is the client.

Source: local SGD as in FedAvg, arXiv:1602.05629; proximal term: FedProx, arXiv:1812.06127, eq. 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayfed_lora.plugins.tables import OPTIMIZERS
from rayfed_lora.recipe.clients import Clients


def fresh_optimizer(
    parameters: list[torch.Tensor], settings: Clients, lr: float
) -> torch.optim.Optimizer | None:
    """Return a fresh optimiser; None where nothing is trained (rank 0 and no head)."""
    if not parameters:
        return None
    chosen = settings.optimizer
    made: torch.optim.Optimizer = OPTIMIZERS.with_options(chosen.name, chosen.options)(
        parameters, lr
    )
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


def cut_to(optimizer: torch.optim.Optimizer | None, clients: int) -> None:
    """Cut an optimiser's state to the first clients of the group, as its parameters were cut."""
    for state in () if optimizer is None else optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[name] = value[:clients]
