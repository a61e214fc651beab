"""rounds.parquet and clients.parquet. Source: this project (docs/design.md, "The run folder")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.federation.evaluation import METRICS
from rayfed_lora.federation.records import ClientRecord, ClientTest, Note, RoundRecord
from rayfed_lora.runs import seals
from rayfed_lora.runs.client_rows import (
    CLIENT_METRICS,
    CLIENT_METRICS_FILE,
    CLIENT_NAME,
    CLIENTS,
    NOTES,
    NOTES_FILE,
    ClientRows,
    columns,
    readable,
)
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import Proposal

PARTITION_FILE = "partition.parquet"
ROUNDS_FILE = "rounds.parquet"
CLIENTS_FILE = "clients.parquet"
# Their columns stand where docs/design.md has them, those of other metrics at the end.
_FIRST_METRICS = ("accuracy", "loss")
IntArray = npt.NDArray[np.int64]
_PROPOSAL_COLUMNS = {
    "proposed_rank": ("rank", pa.int32()),
    "verdict": ("verdict", pa.string()),
    "energy_current": ("energy_current", pa.float64()),
    "energy_proposed": ("energy_proposed", pa.float64()),
    "temperature": ("temperature", pa.float64()),
    "acceptance_probability": ("probability", pa.float64()),
    "acceptance_draw": ("draw", pa.float64()),
    "target_metric": ("metric", pa.float64()),
    "target_value": ("target", pa.float64()),
}


def round_schema(modules: Sequence[str]) -> pa.Schema:
    """Return the columns of rounds.parquet; `ranks` has one field an adapted module.

    Parquet has no column without a field: without adapted modules there is no `ranks`.
    """
    found: list[tuple[str, pa.DataType]] = []
    for name, kind in columns(RoundRecord).items():
        if name == "ranks":
            found += [("ranks", pa.struct([(m, pa.int32()) for m in modules]))] if modules else []
        elif name == "evaluation":
            found += [(f"eval_{metric}", pa.float64()) for metric in _FIRST_METRICS]
        elif name == "proposal":
            found += [(column, kind) for column, (_, kind) in _PROPOSAL_COLUMNS.items()]
        else:
            found.append((name, kind))
    others = [metric for metric in METRICS if metric not in _FIRST_METRICS]
    return pa.schema([*found, *((f"eval_{metric}", pa.float64()) for metric in others)])


def round_row(record: RoundRecord) -> dict[str, Any]:
    """Return a round's row; metrics and proposal have columns of their own."""
    tested = {f"eval_{metric}": record.evaluation.get(metric) for metric in METRICS}
    # Not by `asdict`, which copies what is in the fields too.
    return {**vars(record), **tested, **_proposal_row(record.proposal)}


class Tables:
    """The rows of a run so far and their files.

    Rows of rounds are kept; of clients only those that are not yet in their file, since there may
    be many millions of them.
    """

    def __init__(
        self,
        folder: RunFolder,
        modules: Sequence[str],
        client_names: Sequence[str] | None = None,
    ) -> None:
        """Start empty.

        Args:
            folder: the run folder.
            modules: names of the adapted modules.
            client_names: (clients,) what the data call each client; None where they do not.
        """
        self._folder = folder
        self._schema = round_schema(modules)
        self._rounds = self._schema.empty_table()
        self._new_rounds: list[dict[str, Any]] = []
        self._clients = ClientRows(folder, CLIENTS_FILE, CLIENTS, client_names)
        self._tests = ClientRows(folder, CLIENT_METRICS_FILE, CLIENT_METRICS, client_names)
        self._notes = ClientRows(folder, NOTES_FILE, NOTES)

    @property
    def rounds(self) -> pa.Table:
        """The rows of all rounds."""
        new = pa.Table.from_pylist(self._new_rounds, schema=self._schema)
        self._rounds, self._new_rounds = pa.concat_tables([self._rounds, new]).combine_chunks(), []
        return self._rounds

    def add(self, record: RoundRecord, clients: Sequence[ClientRecord]) -> None:
        """Add the rows of one round.

        Raises:
            RunError: there are many rows, and the folder cannot be written.
        """
        self._new_rounds.append(round_row(record))
        self._clients.add(clients)

    def add_tests(self, tests: Sequence[ClientTest]) -> None:
        """Add tests on clients' own examples; raises as `add` does."""
        self._tests.add(tests)

    def add_notes(self, t: int, texts: Sequence[str]) -> None:
        """Add notes of a round; raises as `add` does."""
        if texts:
            self._notes.add([Note(t, text) for text in texts])

    def begin(self) -> None:
        """Remove what a sitting that never came to a checkpoint may have left.

        The other tables are written over by the first `save`; these only where they have rows.

        Raises:
            RunError: the folder cannot be written.
        """
        for name in (CLIENT_METRICS_FILE, NOTES_FILE):
            self._folder.remove(name)

    def last_tests(self, t: int) -> pa.Table:
        """Return the tests on clients after a round, from the file: save first."""
        return self._tests.of_round(t)

    def save(self) -> None:
        """Write the files, each whole or not at all; tests and notes where there are any.

        Raises:
            RunError: the folder cannot be written.
        """
        seals.write_table(self._folder, ROUNDS_FILE, self.rounds)
        self._clients.save()
        for rows in (self._tests, self._notes):
            if not rows.empty:
                rows.save()

    def rows(self, rounds: int) -> dict[str, int]:
        """Return the number of rows of the first `rounds` rounds, by file: what is in them now.

        The checkpoint keeps it, so that files that are missing or older are known as such.
        """
        found = {ROUNDS_FILE: rounds, CLIENTS_FILE: self._clients.rows_before(rounds)}
        for name, rows in self._optional():
            if not rows.empty:
                found[name] = rows.rows_before(rounds)
        return found

    def _optional(self) -> list[tuple[str, ClientRows]]:
        return [(CLIENT_METRICS_FILE, self._tests), (NOTES_FILE, self._notes)]

    def restore(self, rounds: int, saved: Mapping[str, int] | None = None) -> None:
        """Go back to the first `rounds` rounds; later ones will be run again.

        Args:
            rounds: as the checkpoint has.
            saved: what `rows` was then; None: an older version's checkpoint, whose tables may have
                no checksums.

        Raises:
            RunFolderError: a file is missing or damaged, or rows are.
            RunError: the folder cannot be written.
        """
        self._rounds, self._new_rounds = self._first(rounds, sealed=saved is not None), []
        found = self._rounds["round"].to_pylist()
        count = {} if saved is None else saved
        clients = self._clients.restore(rounds, count.get(CLIENTS_FILE))
        for name, rows in self._optional():
            if rounds == 0 or name in count or self._folder.exists(name):
                rows.restore(rounds, None if saved is None else count.get(name, 0))
        if found != list(range(rounds)) or clients != rounds:
            raise RunFolderError(
                f"{self._folder.location}: expected rounds.parquet and clients.parquet to have"
                f" rounds 0 to {rounds - 1}, as the checkpoint has, got {len(found)} and"
                f" {clients} rounds"
            )
        if saved is None:
            # From now on with checksums; the other tables have got theirs.
            seals.write_table(self._folder, ROUNDS_FILE, self._rounds)

    def _first(self, rounds: int, *, sealed: bool) -> pa.Table:
        if rounds == 0:
            return self._schema.empty_table()
        with (
            readable(self._folder, ROUNDS_FILE),
            seals.opened(self._folder, ROUNDS_FILE, sealed=sealed) as file,
        ):
            table = pq.read_table(file).filter(pc.field("round") < rounds)
            if sealed and table.num_rows < rounds:
                raise seals.damaged(
                    self._folder,
                    ROUNDS_FILE,
                    f"it has {table.num_rows} rounds, the checkpoint knows of {rounds}",
                )
            return table.cast(self._schema)


def write_partition(
    folder: RunFolder,
    clients: IntArray,
    counts: IntArray,
    label_names: Sequence[str],
    client_names: Sequence[str] | None = None,
) -> None:
    """Write partition.parquet: client, label and examples, where there are any; client_name too.

    Args:
        folder: the run folder.
        clients: (k,) clients that stand for all.
        counts: (k, classes) number of training examples.
        label_names: name of class i at place i.
        client_names: what the data call each client there is; None where they do not.

    Raises:
        RunError: the folder cannot be written.
    """
    classes, rows = np.nonzero(counts.T)
    table = pa.table(
        {
            "client": clients[rows],
            "label": pa.array([label_names[i] for i in classes.tolist()], pa.string()),
            "examples": counts[rows, classes],
        }
    )
    if client_names is not None:
        names = [client_names[client] for client in clients[rows].tolist()]
        table = table.append_column(CLIENT_NAME, pa.array(names, pa.string()))
    seals.write_table(folder, PARTITION_FILE, table)


def _proposal_row(proposal: Proposal | None) -> dict[str, Any]:
    return {
        column: None if proposal is None else getattr(proposal, attribute)
        for column, (attribute, _) in _PROPOSAL_COLUMNS.items()
    }
