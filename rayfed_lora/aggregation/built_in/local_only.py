"""No federation: each client trains alone from the common start. Source: this project.

The baseline of personalised methods ("local" in Ditto, arXiv:2012.04221).
"""

from __future__ import annotations

import numpy as np

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic
from rayfed_lora.aggregation.rule import rule
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate
from rayfed_lora.types import AdapterState


def messages(sizes: AdapterRound) -> Traffic:
    """Return nothing both ways; a client that starts from a given adapter is sent that once."""
    nothing = np.zeros(len(sizes.limits), np.int64)
    return Traffic(nothing, nothing, frozen={**sizes.whole("a", "b"), "head": sizes.head})


@rule(
    "local-only",
    needs="means",
    source="2012.04221",
    summary="each client trains alone, nothing is sent",
    method="local-only",
    messages=messages,
    alone=True,
)
def local_only(start: AdapterState, means: Means, step: OptimizerStep) -> Aggregate:
    """Return the common start: a client that takes part for the first time begins there."""
    del means, step
    return Aggregate(start, {}, lambda: None)
