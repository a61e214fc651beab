"""SCAFFOLD: control variates correct the drift of clients. Source: arXiv:1910.06378, algorithm 1.

A client's variate c_i is its memory, the server's c is shared; both begin as 0. The learning rate
of the server is `aggregation.server_optimizer.lr`; updates are weighted as the rule weights them,
by examples, where the paper has the plain mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayfed_lora.objectives.objective import Arrays, Done, LocalStep, objective


@objective(
    "scaffold",
    memory="trained",
    message="trained",
    shared="trained",
    plain_sgd=True,
    source="1910.06378",
    summary="control variates against client drift (SCAFFOLD)",
)
@dataclass(frozen=True)
class Scaffold:
    """Gradients become g - c_i + c; option II of the paper renews c_i."""

    def gradient(self, local: LocalStep) -> None:
        """Add c - c_i (line 10)."""
        for name, gradient in local.gradients.items():
            gradient.add_(local.shared[name] - local.memory[name])

    def after(self, done: Done) -> tuple[Arrays, Arrays]:
        """Return c_i+ = c_i - c + (x - y_i) / (K lr), and c_i+ - c_i (lines 12 and 13)."""
        memory, message = {}, {}
        for name, old in done.memory.items():
            drift = (done.start[name] - done.end[name]) / np.float32(done.steps * done.lr)
            memory[name] = old - done.shared[name] + drift
            message[name] = memory[name] - old
        return memory, message

    def server(self, shared: Arrays, messages: Arrays, clients: int) -> Arrays:
        """Return c + (1 / N) sum over this round's clients of c_i+ - c_i (line 17)."""
        sums = {name: sent.sum(axis=0, dtype=np.float64) for name, sent in messages.items()}
        return {name: c + sums[name] / clients for name, c in shared.items()}
