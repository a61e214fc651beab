"""The plain loss: cross entropy, and nothing else. Source: FedAvg, arXiv:1602.05629."""

from __future__ import annotations

from dataclasses import dataclass

from rayfed_lora.objectives.objective import objective


@objective("none", source="1602.05629", summary="the loss alone")
@dataclass(frozen=True)
class Plain:
    """No hook."""
