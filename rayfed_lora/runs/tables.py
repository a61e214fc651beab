"""rounds.parquet and clients.parquet. Source: this project (docs/design.md, "The run folder")."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfed_lora.data.prompts import Answer
from rayfed_lora.federation.evaluation import BUILT_IN
from rayfed_lora.federation.records import AnswerRecord, ClientRecord, ClientTest, Note, RoundRecord
from rayfed_lora.runs import seals
from rayfed_lora.runs.client_rows import (
    ANSWERS_FILE,
    CLIENT_METRICS_FILE,
    CLIENT_NAME,
    NOTES_FILE,
    ClientRows,
    columns,
    opened,
)
from rayfed_lora.runs.seals import damaged
from rayfed_lora.storage import RunFolder

PARTITION_FILE = "partition.parquet"
ROUNDS_FILE = "rounds.parquet"
CLIENTS_FILE = "clients.parquet"
# Their columns stand where docs/design.md has them, those of other metrics at the end.
_FIRST_METRICS = ("accuracy", "loss")
IntArray = npt.NDArray[np.int64]
# Field of `Proposal`, and type, of each column.
PROPOSAL_COLUMNS = {
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


def round_schema(modules: Sequence[str], metrics: Sequence[str] = ()) -> pa.Schema:
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
            found += [(column, kind) for column, (_, kind) in PROPOSAL_COLUMNS.items()]
        elif kind is None:
            raise TypeError(f"RoundRecord.{name}: no type of a column stands for this type")
        else:
            found.append((name, kind))
    others = [metric for metric in (*BUILT_IN, *metrics) if metric not in _FIRST_METRICS]
    return pa.schema([*found, *((f"eval_{metric}", pa.float64()) for metric in others)])


def round_row(record: RoundRecord, metrics: Sequence[str] = ()) -> dict[str, Any]:
    """Return a round's row; metrics and proposal have columns of their own."""
    tested = {f"eval_{name}": record.evaluation.get(name) for name in (*BUILT_IN, *metrics)}
    proposal = {
        column: None if record.proposal is None else getattr(record.proposal, name)
        for column, (name, _) in PROPOSAL_COLUMNS.items()
    }
    # `asdict` would copy what is in the fields too.
    return {**vars(record), **tested, **proposal}


class Tables:
    """The rows of a run so far and their files; memory holds all rows of rounds, few of clients."""

    def __init__(
        self,
        folder: RunFolder,
        modules: Sequence[str],
        client_names: Sequence[str] | None = None,
        metrics: Sequence[str] = (),
        malicious: frozenset[int] | None = None,
        own: Collection[str] = (),
    ) -> None:
        """Start empty.

        Args:
            folder: the run folder.
            modules: names of the adapted modules.
            client_names: (clients,) names in the data; None where the clients have none.
            metrics: beside the built-in ones.
            malicious: ids of malicious clients; None where the recipe has no attack.
            own: columns of clients.parquet for settings that differ between clients.
        """
        self._folder = folder
        self._metrics = metrics
        self._schema = round_schema(modules, metrics)
        self._rounds = self._schema.empty_table()
        self._new_rounds: list[dict[str, Any]] = []
        self._clients = ClientRows(folder, CLIENTS_FILE, ClientRecord, client_names, malicious, own)
        self._tests = ClientRows(folder, CLIENT_METRICS_FILE, ClientTest, client_names)
        self._notes = ClientRows(folder, NOTES_FILE, Note)
        self._answers = ClientRows(folder, ANSWERS_FILE, AnswerRecord)
        self._files = (self._clients, self._tests, self._notes, self._answers)

    @property
    def rounds(self) -> pa.Table:
        """The rows of all rounds."""
        new = pa.Table.from_pylist(self._new_rounds, schema=self._schema)
        self._rounds, self._new_rounds = pa.concat_tables([self._rounds, new]).combine_chunks(), []
        return self._rounds

    def add(self, record: RoundRecord, clients: Sequence[ClientRecord]) -> None:
        """Add the rows of one round; a RunError where many are saved and cannot be written."""
        self._new_rounds.append(round_row(record, self._metrics))
        self._clients.add(clients)

    def add_tests(self, tests: Sequence[ClientTest]) -> None:
        """Add tests on clients' own examples, if any; raises as `add` does."""
        if tests:
            self._tests.add(tests)

    def add_answers(self, answers: Sequence[AnswerRecord]) -> None:
        """Add answers to prompts, if any; raises as `add` does."""
        if answers:
            self._answers.add(answers)

    def add_notes(self, t: int, texts: Sequence[str]) -> None:
        """Add notes of a round; raises as `add` does."""
        if texts:
            self._notes.add([Note(t, text) for text in texts])

    def begin(self) -> None:
        """Remove the tables of an earlier process that wrote no checkpoint."""
        for name in (ROUNDS_FILE, *(rows.name for rows in self._files)):
            self._folder.remove(name)

    def last_tests(self, t: int) -> pa.Table:
        """Return the tests on clients after a round, read from the file: save first."""
        return self._tests.of_round(t)

    def last_answers(self, t: int) -> list[Answer]:
        """Return the answers after a round, read from the file: save first."""
        rows = self._answers.of_round(t).to_pylist()
        names = [each.name for each in fields(Answer)]
        return [Answer(**{name: row[name] for name in names}) for row in rows]

    def save(self) -> None:
        """Write the files, each whole or not at all; tests and notes where there are any."""
        seals.write_table(self._folder, ROUNDS_FILE, self.rounds)
        for rows in self._present():
            rows.save()

    def _present(self) -> list[ClientRows]:
        return [rows for rows in self._files if rows is self._clients or not rows.empty]

    def rows(self, rounds: int) -> dict[str, int]:
        """Return the rows of the first `rounds` rounds in each file.

        A checkpoint keeps these numbers, so that a missing or older file is noticed.
        """
        counts = {rows.name: rows.rows_before(rounds) for rows in self._present()}
        return {ROUNDS_FILE: rounds, **counts}

    def restore(self, rounds: int, saved: Mapping[str, int]) -> None:
        """Go back to the first `rounds` rounds, for which `rows` returned `saved`.

        Raises RunFolderError where a file is missing or damaged, or lacks rows.
        """
        self._rounds, self._new_rounds = self.first(rounds), []
        for rows in self._files:
            wanted = rows is self._clients or rows.name in saved
            if rounds == 0 or wanted or self._folder.exists(rows.name):
                rows.restore(rounds, saved.get(rows.name, 0))

    def first(self, rounds: int) -> pa.Table:
        """Return the saved rows of the first `rounds` rounds; raises as `restore` does."""
        if rounds == 0:
            return self._schema.empty_table()
        with opened(self._folder, ROUNDS_FILE) as file:
            table = pq.read_table(file).filter(pc.field("round") < rounds)
            if table.num_rows < rounds:
                reason = f"it has {table.num_rows} rounds, the checkpoint knows of {rounds}"
                raise damaged(self._folder, ROUNDS_FILE, reason)
            # Columns that an earlier version did not have are null, and orders may differ.
            for field in self._schema:
                if field.name not in table.column_names:
                    table = table.append_column(field, pa.nulls(table.num_rows, field.type))
            return table.select(self._schema.names).cast(self._schema)


def write_partition(
    folder: RunFolder,
    clients: IntArray,
    counts: IntArray,
    label_names: Sequence[str],
    client_names: Sequence[str] | None = None,
) -> None:
    """Write partition.parquet: client, label and examples where there are any, client_name.

    Args:
        folder: of the run.
        clients: (k,) a sample of all clients.
        counts: (k, classes) number of training examples.
        label_names: (classes,) names.
        client_names: (all clients,) names in the data; None where the clients have none.
    """
    classes, rows = np.nonzero(counts.T)
    labels = pa.array([label_names[i] for i in classes.tolist()], pa.string())
    found = {"client": clients[rows], "label": labels, "examples": counts[rows, classes]}
    if client_names is not None:
        names = [client_names[client] for client in found["client"].tolist()]
        found[CLIENT_NAME] = pa.array(names, pa.string())
    seals.write_table(folder, PARTITION_FILE, pa.table(found))
