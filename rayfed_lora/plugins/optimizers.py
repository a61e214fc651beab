"""The clients' optimisers: those of `torch.optim` that treat each value apart, and own ones.

torch is imported when one is made. The clients of a block are trained together, and the first
dimension of a parameter is the client: an optimiser may not mix values of different clients, as
those do that look at norms of a parameter (Adafactor, Muon), and its state has a parameter's shape.

Source: torch.optim; the papers are named there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rayfed_lora.plugins.tables import OPTIMIZERS

if TYPE_CHECKING:
    import torch

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Small = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
# (parameters, lr) and options -> optimiser.
Make = Callable[..., "torch.optim.Optimizer"]


def optimizer(name: str | None = None) -> Callable[[Make], Any]:
    """Register a local optimiser: a function of (parameters, lr) that returns a torch optimiser.

    It is made anew for each block of clients and round; the first dimension of each parameter is
    the client. Keyword-only parameters are its options, keys of `clients.optimizer`.

    Args:
        name: value of `clients.optimizer.name`; default: the function's, with hyphens.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """
    return lambda function: OPTIMIZERS.add(function, name)


def _of_torch(name: str, parameters: Any, lr: float, **options: Any) -> torch.optim.Optimizer:
    import torch

    made: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, lr=lr, **options)
    return made


@optimizer()
def sgd(
    parameters: Any, lr: float, *, momentum: Share = 0.0, weight_decay: NotNegative = 0.0
) -> torch.optim.Optimizer:
    """Stochastic gradient descent."""
    # Fused, each tensor is read and written once; that needs all momenta from the first step on,
    # and a parameter without a gradient has none yet.
    fused, own = momentum == 0, {"momentum": momentum, "weight_decay": weight_decay}
    return _of_torch("SGD", parameters, lr, fused=fused, **own)


def _adam(torch_name: str, summary: str, **fixed: Any) -> None:
    """Register an optimiser of Adam's family, with Adam's options."""

    def made(
        parameters: Any,
        lr: float,
        *,
        weight_decay: NotNegative = 0.0,
        beta1: Share = 0.9,
        beta2: Share = 0.999,
        eps: Small = 1e-8,
    ) -> torch.optim.Optimizer:
        own = {"weight_decay": weight_decay, "betas": (beta1, beta2), "eps": eps}
        return _of_torch(torch_name, parameters, lr, **own, **fixed)

    made.__doc__ = summary
    OPTIMIZERS.add(made, torch_name.lower())


_adam("AdamW", "Adam with decoupled weight decay.", fused=True)
_adam("Adam", "Adam.", fused=True)
_adam("Adamax", "Adam with the infinity norm.")
_adam("NAdam", "Adam with Nesterov's momentum.")
_adam("RAdam", "Rectified Adam.")


@optimizer()
def adagrad(
    parameters: Any, lr: float, *, weight_decay: NotNegative = 0.0, eps: Small = 1e-10
) -> torch.optim.Optimizer:
    """Adagrad."""
    return _of_torch("Adagrad", parameters, lr, weight_decay=weight_decay, eps=eps)


@optimizer()
def adadelta(
    parameters: Any,
    lr: float,
    *,
    weight_decay: NotNegative = 0.0,
    rho: Share = 0.9,
    eps: Small = 1e-6,
) -> torch.optim.Optimizer:
    """Adadelta."""
    return _of_torch("Adadelta", parameters, lr, weight_decay=weight_decay, rho=rho, eps=eps)


@optimizer()
def rmsprop(
    parameters: Any,
    lr: float,
    *,
    momentum: Share = 0.0,
    weight_decay: NotNegative = 0.0,
    alpha: Share = 0.99,
    eps: Small = 1e-8,
) -> torch.optim.Optimizer:
    """RMSprop."""
    own = {"momentum": momentum, "weight_decay": weight_decay, "alpha": alpha, "eps": eps}
    return _of_torch("RMSprop", parameters, lr, **own)


@optimizer()
def rprop(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Resilient backpropagation."""
    return _of_torch("Rprop", parameters, lr)


@optimizer()
def asgd(parameters: Any, lr: float, *, weight_decay: NotNegative = 0.0) -> torch.optim.Optimizer:
    """Averaged stochastic gradient descent."""
    return _of_torch("ASGD", parameters, lr, weight_decay=weight_decay)
