"""Availability traces: when each client can be reached."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data import columns, raw_tables
from rayfed_lora.data.place import Place
from rayfed_lora.errors import DataError
from rayfed_lora.types import TRACE_DIGITS, AvailabilityTrace

if TYPE_CHECKING:
    import pandas as pd

_OPTION = "clients.availability.trace"
_COLUMNS = ("client", "start_s", "end_s")


def read_trace(
    source: str,
    clients: int,
    period_s: float | None,
    names: Sequence[str] | None = None,
    known: Collection[str] = (),
) -> AvailabilityTrace:
    """Read a table with a row for each time in which a client can be reached.

    Args:
        source: a path or URI of a table with the columns client (its name, or its number from 0
            where clients have no names), start_s and end_s (seconds).
        clients: number of clients.
        period_s: the period after which the trace repeats; None: it does not.
        names: (clients,) the clients' names in the data; None where they have none.
        known: every client in the data; rows of clients without training examples are skipped.

    Raises:
        DataError: the table cannot be read, or has a wrong row; the message names the first one.
    """
    where = f"{_OPTION} {source!r}"
    if not raw_tables.is_table(source):
        raise DataError(f"{where}: need a path or URI ending in {' '.join(raw_tables.READERS)}")
    raw = raw_tables.read_file(source, () if names is None else ("client",), _OPTION)
    table = raw.train
    if any(table.column_names.count(name) != 1 for name in _COLUMNS):
        raise DataError(
            f"{where}: need one column each of {', '.join(_COLUMNS)}, got the columns"
            f" {', '.join(table.column_names)}"
        )
    if table.num_rows == 0:
        raise DataError(f"{where}: need rows, got an empty table")
    if names is not None:
        table = _numbered(table, where, names, known, typed=raw.typed)
    # Most runs have no trace: pandas takes half a second.
    import pandas as pd

    rows = pd.DataFrame({name: _numbers(table[name], where, name) for name in _COLUMNS})
    rows = rows.round({"start_s": TRACE_DIGITS, "end_s": TRACE_DIGITS})
    limit = np.inf if period_s is None else round(period_s, TRACE_DIGITS)
    client, start, end = (rows[name] for name in _COLUMNS)
    is_client = (client % 1 == 0) & client.between(0, clients - 1)
    rules = {
        f"a whole number from 0 to {clients - 1} as client": is_client,
        "0 <= start_s < end_s": (start >= 0) & (start < end),
        f"end_s up to period_s ({limit:g})": end <= limit,
    }
    for expected, right in rules.items():
        if not right.all():
            row = int(right.argmin())
            raise DataError(
                f"{where}: need {expected}, got client {client[row]:g} from {start[row]:g} to"
                f" {end[row]:g} in row {row + 1}"
            )
    return _joined(rows)


def _numbered(
    table: pa.Table, where: str, names: Sequence[str], known: Collection[str], *, typed: bool
) -> pa.Table:
    """Return the rows of clients with training examples, with numbers in place of names."""
    column, place = table["client"], Place(f"{where}, column 'client'")
    named, every = columns.as_client_names(column, place), pa.array({*names, *known}, pa.string())
    if not pc.all(pc.is_in(named, value_set=every)).as_py():
        # As in a CSV source of data, 7.0 is client 7.
        named = columns.as_client_names(column, place, typed)
    is_known = pc.is_in(named, value_set=every)
    if not pc.all(is_known).as_py():
        row = pc.index(is_known, False).as_py()
        raise DataError(
            f"{where}: need clients as data.partition.column names them (such as"
            f" {', '.join(map(repr, names[:3]))}), got {named[row].as_py()!r} in row {row + 1}"
        )
    numbers = pc.index_in(named, value_set=pa.array(names, pa.string()))
    numbered = table.set_column(table.column_names.index("client"), "client", numbers)
    rows = numbered.filter(pc.is_valid(numbers))
    if rows.num_rows == 0:
        raise DataError(f"{where}: need rows of clients with training examples, got none")
    return rows


def _joined(rows: pd.DataFrame) -> AvailabilityTrace:
    """Return the rows sorted by client and time; intervals that touch or overlap become one."""
    rows = rows.astype({"client": np.int64}).sort_values(["client", "start_s"], ignore_index=True)
    latest_end = rows.groupby("client")["end_s"].cummax().groupby(rows["client"]).shift()
    # The first row of a client compares with NaN, so it starts an interval.
    interval = (~(rows["start_s"] <= latest_end)).cumsum()
    joined = rows.groupby(interval).agg({"client": "first", "start_s": "first", "end_s": "max"})
    return AvailabilityTrace(*(joined[name].to_numpy() for name in _COLUMNS))


def _numbers(column: pa.ChunkedArray, where: str, name: str) -> npt.NDArray[np.float64]:
    where = f"{where}, column {name!r}"
    values: npt.NDArray[np.float64] = columns.as_numbers(column, Place(where)).to_numpy()
    if not np.isfinite(values).all():
        row = int(np.isfinite(values).argmin())
        got = f"{values[row]:g} in row {row + 1}"
        raise DataError(f"{where}: need a number in every row, got {got}")
    return values
