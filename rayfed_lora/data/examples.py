"""Model-ready examples in an Arrow table that processes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]
LABELS = "labels"
# The input of image models.
PIXELS = "pixel_values"
# Not an input of models: above 0 on the tokens of a text whose prediction counts; default: all.
COUNTED = "counted"
# Places of tokens from 0 in each of several texts of a row; the row's other texts are not seen.
POSITIONS = "position_ids"


@dataclass(frozen=True)
class Batch:
    """Arrays by the model's own input names, one row an example, and (rows,) int64 labels."""

    inputs: Mapping[str, Array]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Inputs and labels of n examples.

    Ray keeps an Arrow table in its memory-mapped object store, so that all actors read the same
    memory.

    Attributes:
        table: a column of fixed-shape tensors for each of the model's own input names
            (`attention_mask`, where there is one, is 1 on tokens and 0 on the padding behind
            them), and int64 `labels`; n rows in one chunk.
    """

    table: pa.Table

    @classmethod
    def of(cls, inputs: Mapping[str, Array], labels: Array) -> Examples:
        """Take arrays whose first dimension is n."""
        columns = {name: _column(values) for name, values in inputs.items()}
        return cls(pa.table({**columns, LABELS: np.asarray(labels, np.int64)}))

    def __len__(self) -> int:
        """Return n."""
        return int(self.table.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the views, which would be copied."""
        return {"table": self.table}

    @cached_property
    def inputs(self) -> Mapping[str, Array]:
        """The input columns as arrays of n rows: read-only views."""
        names = [name for name in self.table.column_names if name != LABELS]
        return {name: self.table[name].chunk(0).to_numpy_ndarray() for name in names}

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """The labels as an array: a read-only view."""
        view: npt.NDArray[np.int64] = self.table[LABELS].chunk(0).to_numpy()
        return view

    def rows(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return copies of the given rows, cut to the longest text among them."""
        inputs = {name: values[indices] for name, values in self.inputs.items()}
        mask = inputs.get("attention_mask")
        if mask is not None and len(indices) > 0:
            length = max(int(mask.sum(axis=1).max()), 1)
            inputs = {name: values[:, :length] for name, values in inputs.items()}
        return Batch(inputs, self.labels[indices])


def _column(values: Array) -> pa.FixedShapeTensorArray:
    # pyarrow's from_numpy_ndarray rejects arrays without rows.
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), values.shape[1:])
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    size = kind.storage_type.list_size
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat, size))
