"""An own aggregation rule: the mean of each value over the clients between the extremes."""

from typing import Annotated

import numpy as np
from pydantic import Field

import rayfed_lora
from rayfed_lora.plugins import rule


@rule()
def middle_mean(start, updates, *, share: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.2):
    """Leave out the largest and the smallest values of each tensor."""
    cut = int(share * len(updates))
    kept = slice(cut, len(updates) - cut)
    return {name: np.sort(t, axis=0)[kept].mean(axis=0) for name, t in updates.tensors.items()}


if __name__ == "__main__":
    result = rayfed_lora.run("examples/small.yaml", plugins=[middle_mean(share=0.25)])
    print(result.rounds[["round", "rank", "eval_accuracy", "aggregation_error"]])
