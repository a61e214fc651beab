"""FedDyn: clients' losses are regularised dynamically. Source: arXiv:2111.04263, algorithm 1.

A client's gradient g_k at its last own model is its memory; the server's h stays on the server;
both begin as 0. Nothing is sent beside the update. The mean of the clients' models is the rule's,
weighted by `clients.weight`, where the paper has the plain mean: `clients.weight: uniform`.
Clients take some optimiser steps, where the paper minimises exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from rayfed_lora.objectives.objective import Arrays, Done, LocalStep, ModelStep, objective


@objective(
    "feddyn",
    memory="trained",
    shared="trained",
    source="2111.04263",
    summary="losses regularised dynamically, by what clients and server remember (FedDyn)",
)
@dataclass(frozen=True)
class FedDyn:
    """Client k minimises L_k(x) - <g_k, x> + alpha / 2 ||x - x_received||^2."""

    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.01

    def gradient(self, local: LocalStep) -> None:
        """Add alpha (x - x_received) - g_k."""
        for name, gradient in local.gradients.items():
            gradient.add_(local.parameters[name] - local.received[name], alpha=self.alpha)
            gradient.sub_(local.memory[name])

    def after(self, done: Done) -> tuple[Arrays, Arrays]:
        """Return g_k - alpha (x_k - x_received), the gradient of L_k at x_k, and no message."""
        return {
            name: old - self.alpha * (done.end[name] - done.start[name])
            for name, old in done.memory.items()
        }, {}

    def model(self, step: ModelStep) -> tuple[Arrays, Arrays]:
        """Return the next model, mean_k x_k - h / alpha, and h - alpha / m sum_k (x_k - x).

        m is the number of all clients; the sum is over those of the round.
        """
        part = self.alpha * step.arrived / step.clients
        h, model = {}, {}
        for name, mean in step.mean.items():
            moved = mean - step.start[name]
            h[name] = np.asarray(step.shared[name] - part * moved, np.float32)
            model[name] = np.asarray(mean - h[name] / self.alpha, np.float32)
        return model, h
