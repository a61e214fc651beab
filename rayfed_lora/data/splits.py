"""Random splits and subsets, keyed by the run's seed. Source: this project."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa

from rayfed_lora import seeds
from rayfed_lora.errors import DataError

Split = Literal["test", "validation"]
# Counters of the split stream.
_COUNTER: Mapping[Split, int] = {"test": 0, "validation": 1}
_SUBSET_COUNTER = 2


def split(
    table: pa.Table, fraction: float, seed: int, name: Split, where: str
) -> tuple[pa.Table, pa.Table]:
    """Split off ceil(fraction * rows) random rows; both parts keep the order of rows.

    The split is stratified by `label` where every class has enough members. Each split name has
    its own random numbers.

    Returns:
        The remaining rows, and those split off.

    Raises:
        DataError: no row would remain.
    """
    from sklearn.model_selection import train_test_split

    total = table.num_rows
    cut = math.ceil(fraction * total)
    if cut >= total:
        raise DataError(
            f"{where}: need rows left for training, got {total} rows of which a share of"
            f" {fraction:g} is kept for the {name} split"
        )
    labels = table["label"].to_numpy()
    members = np.unique(labels, return_counts=True)[1]
    stratify = members.min() >= 2 and len(members) <= min(cut, total - cut)
    state = int(seeds.sequence(seed, seeds.Purpose.SPLIT, _COUNTER[name]).generate_state(1)[0])
    rest, kept = train_test_split(
        np.arange(total),
        test_size=cut,
        random_state=state,
        stratify=labels if stratify else None,
    )
    return table.take(np.sort(rest)), table.take(np.sort(kept))


def subset(table: pa.Table, size: int | None, seed: int) -> pa.Table:
    """Return `size` random rows in their order, or all where there are no more than that."""
    if size is None or size >= table.num_rows:
        return table
    rng = seeds.generator(seed, seeds.Purpose.SPLIT, _SUBSET_COUNTER)
    return table.take(np.sort(rng.choice(table.num_rows, size, replace=False)))
