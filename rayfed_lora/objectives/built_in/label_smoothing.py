"""Cross entropy against softened labels. Source: arXiv:1512.00567, section 7."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from rayfed_lora.objectives.objective import objective


@objective("label-smoothing", source="1512.00567", summary="cross entropy with softened labels")
@dataclass(frozen=True)
class LabelSmoothing:
    """A label counts 1 - amount, and each of the K classes amount / K beside it."""

    amount: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1

    def loss(self, logits: Any, labels: Any) -> Any:
        """Return -(1 - amount) log p_label - (amount / K) sum_k log p_k for each example."""
        log_p = logits.log_softmax(dim=-1)
        of_label = log_p.gather(1, labels[:, None])[:, 0]
        return -(1.0 - self.amount) * of_label - self.amount * log_p.mean(dim=-1)
