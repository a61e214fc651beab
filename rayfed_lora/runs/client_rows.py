"""Tables with a row a client, written as the run goes on. Source: this project (docs/design.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.federation.records import ClientRecord, ClientTest, Count, Note
from rayfed_lora.locations import child
from rayfed_lora.runs import seals
from rayfed_lora.storage import RunFolder

_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string(), Count: pa.int32()}


def columns(record: type) -> dict[str, pa.DataType | None]:
    """Return the columns of a table by the types of its record's fields.

    None for a field that is more than one column.
    """
    return {
        name: _arrow(hint) for name, hint in get_type_hints(record, include_extras=True).items()
    }


def _arrow(hint: Any) -> pa.DataType | None:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is Literal:
        hint = str
    try:
        return _ARROW.get(hint)
    except TypeError:
        return None


CLIENTS = pa.schema(list(columns(ClientRecord).items()))
CLIENT_METRICS = pa.schema(list(columns(ClientTest).items()))
# Where the data name the clients (partition kind `column`): the value that makes the client.
CLIENT_NAME = "client_name"
NOTES = pa.schema(list(columns(Note).items()))
NOTES_FILE = "notes.parquet"
CLIENT_METRICS_FILE = "client_metrics.parquet"
_ROW_GROUP = 65_536
# Rows that wait for a checkpoint at most: 70 bytes each.
_WAITING = 4 * _ROW_GROUP


class ClientRows:
    """The file and the rows that are not in it yet.

    Each save copies the file, a row group at a time, and adds to it: at any moment there is one
    whole file, and memory does not grow with the run.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        schema: pa.Schema,
        client_names: Sequence[str] | None = None,
    ) -> None:
        """Start with no rows, whatever the folder holds.

        Args:
            folder: the run folder.
            name: of the file in it.
            schema: its columns; the first one is the round.
            client_names: what the data call each client: one more column, `client_name`.
        """
        self._folder = folder
        self._name = name
        self._schema = schema
        self._client_names = client_names
        if client_names is not None:
            self._schema = schema.append(pa.field(CLIENT_NAME, pa.string()))
        self._waiting: list[pa.Table] = []
        self._written = False
        # Rows of rounds that are saved for good, and rounds and numbers of the rows after them.
        self._settled = 0
        # Whether the file must have a seal: an older version's has none.
        self._sealed = True
        self._later: list[tuple[int, int]] = []

    def add(self, records: Sequence[ClientRecord | ClientTest | Note]) -> None:
        """Add the rows of a round.

        Raises:
            RunError: so many wait that they are saved, and the folder cannot be written.
        """
        names = [name for name in self._schema.names if name != CLIENT_NAME]
        columns = {name: [getattr(record, name) for record in records] for name in names}
        if self._client_names is not None:
            columns[CLIENT_NAME] = [self._client_names[client] for client in columns["client"]]
        self._waiting.append(pa.Table.from_pydict(columns, schema=self._schema))
        self._later += [(t, count) for t, count in Counter(columns["round"]).items()]
        if sum(table.num_rows for table in self._waiting) > _WAITING:
            self.save()

    @property
    def empty(self) -> bool:
        """Whether there are no rows, here or in the file."""
        return not self._written and not self._waiting

    def rows_before(self, rounds: int) -> int:
        """Return the number of rows of the first `rounds` rounds; never asked for fewer later."""
        self._settled += sum(count for t, count in self._later if t < rounds)
        self._later = [(t, count) for t, count in self._later if t >= rounds]
        return self._settled

    def save(self) -> None:
        """Bring all rows into the file.

        Raises:
            RunFolderError: the file is damaged.
            RunError: the folder cannot be written.
        """
        if self._written and not self._waiting:
            return
        new = pa.concat_tables([self._schema.empty_table(), *self._waiting])
        if self._written:
            with (
                readable(self._folder, self._name),
                seals.opened(self._folder, self._name, sealed=self._sealed) as source,
                pq.ParquetFile(source) as old,
            ):
                groups = (old.read_row_group(i) for i in range(old.num_row_groups))
                self._write(groups, new)
        else:
            self._write(iter(()), new)
        self._waiting, self._written, self._sealed = [], True, True

    def of_round(self, t: int) -> pa.Table:
        """Return the saved rows of a round."""
        if not self._written:
            return self._schema.empty_table()
        with (
            readable(self._folder, self._name),
            seals.opened(self._folder, self._name, sealed=self._sealed) as source,
        ):
            return pq.read_table(source, filters=pc.field("round") == t)

    def restore(self, rounds: int, rows: int | None = None) -> int:
        """Keep the rows of the first `rounds` rounds only; return how many rounds those are.

        Args:
            rounds: as the checkpoint has.
            rows: how many rows of those rounds the checkpoint knows of; None: an older version
                wrote it, and the file may have no checksum.

        Raises:
            RunFolderError: the file is missing or damaged, or lacks rows.
            RunError: the folder cannot be written.
        """
        self._waiting, self._written = [], rounds > 0
        self._settled, self._later = 0, []
        if rounds == 0:
            return 0
        found: Counter[int] = Counter()
        self._sealed = rows is not None
        with (
            readable(self._folder, self._name),
            seals.opened(self._folder, self._name, sealed=self._sealed) as source,
        ):
            old = pq.ParquetFile(source)
            if old.schema_arrow != self._schema:
                raise ValueError(
                    f"expected columns {self._schema.names}, got {old.schema_arrow.names}"
                )
            for i in range(old.num_row_groups):
                found.update(old.read_row_group(i, columns=["round"])["round"].to_pylist())
            self._settled = sum(count for t, count in found.items() if t < rounds)
            if rows is not None and self._settled < rows:
                raise seals.damaged(
                    self._folder,
                    self._name,
                    f"it has {self._settled} rows of the first {rounds} rounds, the checkpoint"
                    f" knows of {rows}",
                )
            if max(found, default=0) >= rounds or not seals.has_seal(source):
                first = pc.field("round") < rounds
                groups = (old.read_row_group(i).filter(first) for i in range(old.num_row_groups))
                self._write(groups, self._schema.empty_table())
        return len({t for t in found if t < rounds})

    def _write(self, groups: Iterator[pa.Table], new: pa.Table) -> None:
        """Write row groups and what comes after them; all but the last have the same size."""
        rest = self._schema.empty_table()
        with (
            self._folder.opened(self._name) as sink,
            seals.table_writer(sink, self._schema) as writer,
        ):
            for group in groups:
                rest = pa.concat_tables([rest, group])
                if rest.num_rows >= _ROW_GROUP:
                    writer.write_table(rest.slice(0, _ROW_GROUP))
                    rest = rest.slice(_ROW_GROUP)
            rest = pa.concat_tables([rest, new])
            writer.write_table(rest.combine_chunks(), row_group_size=_ROW_GROUP)


@contextmanager
def readable(folder: RunFolder, name: str) -> Iterator[None]:
    """Turn what a missing or damaged file raises into an error that names it.

    Raises:
        RunFolderError: it cannot be read.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise RunFolderError(f"cannot go on from {child(folder.location, name)}: {error}") from None
