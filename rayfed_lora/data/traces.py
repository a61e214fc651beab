"""Traces: when each client can be reached. Source: this project."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data import columns, naming, sources
from rayfed_lora.errors import DataError
from rayfed_lora.types import TRACE_DIGITS, Trace

_OPTION = "clients.availability.trace"
_COLUMNS = ("client", "start_s", "end_s")


def read_trace(
    source: str,
    clients: int,
    period_s: float | None,
    names: Sequence[str] | None = None,
    known: Collection[str] = (),
) -> Trace:
    """Read a table with a row for each time in which a client can be reached.

    Args:
        source: a path or URI with columns client (its name, else its number from 0), start_s and
            end_s (seconds).
        clients: number of clients there are.
        period_s: the trace begins anew after so long; None: never.
        names: (clients,) what the data call each client; None where they do not.
        known: every client that the data name; rows of those that have no training example are
            passed over.

    Raises:
        DataError: it cannot be read, or a row makes no sense; names the first one.
    """
    where = f"{_OPTION} {source!r}"
    if sources.suffix_of(source) not in sources.READERS:
        raise DataError(f"{where}: need a path or URI ending in {' '.join(sources.READERS)}")
    raw = sources.read_file(source, () if names is None else ("client",), _OPTION)
    table = raw.train
    missing = [name for name in _COLUMNS if table.column_names.count(name) != 1]
    if missing:
        raise DataError(
            f"{where}: need one column each of {', '.join(_COLUMNS)}, got the columns"
            f" {', '.join(table.column_names)}"
        )
    if table.num_rows == 0:
        raise DataError(f"{where}: need rows, got an empty table")
    if names is not None:
        table = _numbered(table, where, names, known, typed=raw.typed)
    client, start, end = (_numbers(table[name], f"{where}, column {name!r}") for name in _COLUMNS)
    start, end = start.round(TRACE_DIGITS), end.round(TRACE_DIGITS)
    limit = np.inf if period_s is None else round(period_s, TRACE_DIGITS)
    faults = {
        f"a whole number from 0 to {clients - 1} as client": (client % 1 != 0)
        | (client < 0)
        | (client >= clients),
        "0 <= start_s < end_s": ~((start >= 0) & (start < end)),
        f"end_s up to period_s ({limit:g})": end > limit,
    }
    for expected, wrong in faults.items():
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{where}: need {expected}, got client {client[row]:g} from {start[row]:g} to"
                f" {end[row]:g} in row {row + 1}"
            )
    return _joined(client.astype(np.int64), start, end)


def _numbered(
    table: pa.Table,
    where: str,
    names: Sequence[str],
    known: Collection[str],
    *,
    typed: bool,
) -> pa.Table:
    """Return the rows of clients with training examples, with numbers in place of names."""
    column, place = table["client"], f"{where}, column 'client'"
    named, every = columns.as_client_names(column, place), pa.array({*names, *known}, pa.string())
    if not typed and not pc.all(pc.is_in(named, value_set=every)).as_py():
        # As the data's own column of a CSV file: 7.0 is client 7.
        named = columns.as_client_names(naming.csv_names(column), place)
    strange = pc.invert(pc.is_in(named, value_set=every))
    if pc.any(strange).as_py():
        row = pc.index(strange, True).as_py()
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


def _joined(
    client: npt.NDArray[np.int64], start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]
) -> Trace:
    """Return the rows by client and time, those that touch or overlap as one."""
    rows: list[tuple[int, float, float]] = []
    order = np.lexsort((start, client))
    for row in zip(*(part[order].tolist() for part in (client, start, end)), strict=True):
        k, begins, ends = row
        if rows and rows[-1][0] == k and begins <= rows[-1][2]:
            rows[-1] = (k, rows[-1][1], max(rows[-1][2], ends))
        else:
            rows.append((k, begins, ends))
    clients, starts, stops = zip(*rows, strict=True)
    return Trace(np.array(clients, np.int64), np.array(starts), np.array(stops))


def _numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: need numbers, got {kind}")
    values = np.asarray(column.to_numpy(), np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(
            f"{where}: need a number in every row, got {values[row]:g} in row {row + 1}"
        )
    return values
