"""FedProx's term in every round, whatever its stage. Source: arXiv:1812.06127, eq. 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rayfed_lora.objectives.objective import LocalStep, objective


@objective("proximal", source="1812.06127", summary="pull towards the received model (FedProx)")
@dataclass(frozen=True)
class Proximal:
    """The gradient of (weight / 2) * ||theta - theta_received||^2 is added."""

    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.01

    def gradient(self, local: LocalStep) -> None:
        """Add weight * (theta - theta_received)."""
        for name, gradient in local.gradients.items():
            gradient.add_(local.parameters[name] - local.received[name], alpha=self.weight)
