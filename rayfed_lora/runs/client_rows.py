"""Tables with a row a client, written as the run goes on. Source: this project (docs/design.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.federation.records import AnswerRecord, ClientRecord, ClientTest, Count, Note
from rayfed_lora.locations import child
from rayfed_lora.runs import seals
from rayfed_lora.runs.seals import damaged
from rayfed_lora.storage import RunFolder

_ARROW = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    Count: pa.int32(),
}


def columns(record: type) -> dict[str, pa.DataType | None]:
    """Return the columns of a table by the fields of its record; None: more than one column."""
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


# Where the data name the clients (partition kind `column`): the value that makes the client.
CLIENT_NAME = "client_name"
# Where some clients are malicious: whether the client is one of them.
MALICIOUS = "malicious"
# Where settings differ between clients: the client's own.
OWN = ("lr", "local_steps", "batch_size")
NOTES_FILE = "notes.parquet"
CLIENT_METRICS_FILE = "client_metrics.parquet"
ANSWERS_FILE = "answers.parquet"
_ROW_GROUP = 65_536
# Most rows in memory between two checkpoints, 70 bytes each.
_WAITING = 4 * _ROW_GROUP


class ClientRows:
    """A file, and the rows that are not in it yet; `name` is the file's.

    Each save copies the file, a row group at a time, and appends to the copy: one whole file exists
    at any moment, and memory does not grow with the run.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        record: type,
        client_names: Sequence[str] | None = None,
        malicious: frozenset[int] | None = None,
        own: Collection[str] = (),
    ) -> None:
        """Start with no rows, whatever is in the folder.

        Args:
            folder: the run folder.
            name: of the file in it.
            record: type of the rows, with a field `round`; each field is a column.
            client_names: (clients,) names, written to a further column `client_name`.
            malicious: ids of malicious clients, for a further column `malicious`; None: no column.
            own: those of the columns `OWN` that there are.
        """
        self._folder = folder
        self.name = name
        kept = {name: of for name, of in columns(record).items() if name not in OWN or name in own}
        self._schema = pa.schema(list(kept.items()))
        self._columns = self._schema.names
        self._client_names = client_names
        if client_names is not None:
            self._schema = self._schema.append(pa.field(CLIENT_NAME, pa.string()))
        self._malicious = malicious
        if malicious is not None:
            self._schema = self._schema.append(pa.field(MALICIOUS, pa.bool_()))
        self._waiting: list[pa.Table] = []
        self._written = False
        # Number of rows of each round, in the file or not.
        self._counts: Counter[int] = Counter()

    def add(self, records: Sequence[ClientRecord | ClientTest | Note | AnswerRecord]) -> None:
        """Add rows; many waiting rows are saved, which may raise as `save` does."""
        new = {name: [getattr(record, name) for record in records] for name in self._columns}
        if self._client_names is not None:
            new[CLIENT_NAME] = [self._client_names[client] for client in new["client"]]
        if self._malicious is not None:
            new[MALICIOUS] = [client in self._malicious for client in new["client"]]
        self._waiting.append(pa.Table.from_pydict(new, schema=self._schema))
        self._counts.update(new["round"])
        if sum(table.num_rows for table in self._waiting) > _WAITING:
            self.save()

    @property
    def empty(self) -> bool:
        """Whether there are no rows, in memory or in the file."""
        return not self._written and not self._waiting

    def rows_before(self, rounds: int) -> int:
        """Return the number of rows of the first `rounds` rounds."""
        return sum(count for t, count in self._counts.items() if t < rounds)

    def save(self) -> None:
        """Write all rows; RunFolderError: the file is damaged, RunError: it cannot be written."""
        if self._written and not self._waiting:
            return
        new = pa.concat_tables([self._schema.empty_table(), *self._waiting])
        if self._written:
            with opened(self._folder, self.name) as file:
                self._write(_row_groups(file), new)
        else:
            self._write(iter(()), new)
        self._waiting, self._written = [], True

    def of_round(self, t: int) -> pa.Table:
        """Return the saved rows of a round."""
        if not self._written:
            return self._schema.empty_table()
        with opened(self._folder, self.name) as file:
            return pq.read_table(file, filters=pc.field("round") == t)

    def restore(self, rounds: int, rows: int) -> None:
        """Keep the rows of the first `rounds` rounds only, of which the checkpoint knows `rows`.

        Raises:
            RunFolderError: the file is missing or damaged, or lacks rows.
            RunError: the folder cannot be written.
        """
        self._waiting, self._written, self._counts = [], rounds > 0, Counter()
        if rounds == 0:
            return
        with opened(self._folder, self.name) as file:
            schema = pq.read_schema(file)
            if schema != self._schema:
                raise ValueError(f"expected columns {self._schema.names}, got {schema.names}")
            found: Counter[int] = Counter()
            for group in _row_groups(file, columns=["round"]):
                found.update(group["round"].to_pylist())
            self._counts = Counter({t: count for t, count in found.items() if t < rounds})
            if self._counts.total() < rows:
                reason = (
                    f"it has {self._counts.total()} rows of the first {rounds} rounds, the"
                    f" checkpoint knows of {rows}"
                )
                raise damaged(self._folder, self.name, reason)
            if found.keys() != self._counts.keys():
                first = (group.filter(pc.field("round") < rounds) for group in _row_groups(file))
                self._write(first, self._schema.empty_table())

    def _write(self, groups: Iterator[pa.Table], new: pa.Table) -> None:
        """Write row groups and new rows; all row groups but the last get the same size."""
        rest = self._schema.empty_table()
        with (
            self._folder.open_to_write(self.name) as sink,
            seals.table_writer(sink, self._schema) as writer,
        ):
            for group in groups:
                rest = pa.concat_tables([rest, group])
                if rest.num_rows >= _ROW_GROUP:
                    writer.write_table(rest.slice(0, _ROW_GROUP))
                    rest = rest.slice(_ROW_GROUP)
            rest = pa.concat_tables([rest, new])
            writer.write_table(rest.combine_chunks(), row_group_size=_ROW_GROUP)


def _row_groups(file: pa.NativeFile, columns: list[str] | None = None) -> Iterator[pa.Table]:
    table = pq.ParquetFile(file)
    return (table.read_row_group(i, columns) for i in range(table.num_row_groups))


@contextmanager
def opened(folder: RunFolder, name: str) -> Iterator[pa.NativeFile]:
    """Open a table to resume from; all errors, also of the block, are RunFolderErrors."""
    try:
        with seals.open_table(folder, name) as file:
            yield file
    except (OSError, ValueError) as error:
        where = child(folder.location, name)
        raise RunFolderError(f"cannot resume from {where}: {error}") from None
