"""Model-ready examples: plain arrays that Ray can share without copying. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Examples:
    """Inputs and labels of n examples.

    Attributes:
        inputs: arrays by the model's own input names, first dimension n; `attention_mask`, where
            there is one, is 1 on tokens and 0 on the padding behind them.
        labels: (n,) int64.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)

    def rows(self, indices: npt.NDArray[np.int64]) -> Examples:
        """Return the given rows, cut to the longest text among them."""
        inputs = {name: values[indices] for name, values in self.inputs.items()}
        mask = inputs.get("attention_mask")
        if mask is not None and len(indices) > 0:
            length = max(int(mask.sum(axis=1).max()), 1)
            inputs = {name: values[:, :length] for name, values in inputs.items()}
        return Examples(inputs, self.labels[indices])
