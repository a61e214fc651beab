"""rounds.parquet and clients.parquet. Source: this project (design.md, "The run folder")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfed_lora.errors import RunFolderError
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import ClientRecord, Proposal, RoundRecord

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

CLIENT_SCHEMA = pa.schema(
    [
        ("round", pa.int32()),
        ("client", pa.int64()),
        ("examples", pa.int64()),
        ("train_loss", pa.float64()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("bytes_up", pa.int64()),
        ("bytes_down", pa.int64()),
        ("seconds", pa.float64()),
    ]
)


def round_schema(modules: Sequence[str]) -> pa.Schema:
    """Return the columns of rounds.parquet; `ranks` has one field an adapted module."""
    ranks = pa.struct([(name, pa.int32()) for name in modules])
    return pa.schema(
        [
            ("round", pa.int32()),
            ("stage", pa.string()),
            ("rank", pa.float64()),
            ("ranks", ranks),
            ("trainable_params", pa.int64()),
            ("proximal_weight", pa.float64()),
            ("clients", pa.int32()),
            ("failed_clients", pa.int32()),
            ("train_loss", pa.float64()),
            ("eval_accuracy", pa.float64()),
            ("eval_loss", pa.float64()),
            ("aggregation_error", pa.float64()),
            ("params_up", pa.int64()),
            ("params_down", pa.int64()),
            ("bytes_up", pa.int64()),
            ("bytes_down", pa.int64()),
            ("bytes_base", pa.int64()),
            ("seconds", pa.float64()),
            ("learning_rate", pa.float64()),
            ("validation_accuracy", pa.float64()),
            ("validation_loss", pa.float64()),
            *((column, kind) for column, (_, kind) in _PROPOSAL_COLUMNS.items()),
        ]
    )


class Tables:
    """The rows of a run so far, as Arrow tables, and their files."""

    def __init__(self, folder: RunFolder, modules: Sequence[str]) -> None:
        """Start empty.

        Args:
            folder: the run folder.
            modules: names of the adapted modules.
        """
        self._folder = folder
        self._schema = round_schema(modules)
        self._rounds = [self._schema.empty_table()]
        self._clients = [CLIENT_SCHEMA.empty_table()]

    @property
    def rounds(self) -> pa.Table:
        """The rows of all rounds."""
        return pa.concat_tables(self._rounds)

    @property
    def clients(self) -> pa.Table:
        """The rows of all clients in all rounds."""
        return pa.concat_tables(self._clients)

    def add(self, record: RoundRecord, clients: Sequence[ClientRecord]) -> None:
        """Add the rows of one round."""
        row = {**asdict(record), **_proposal_row(record.proposal)}
        self._rounds.append(pa.Table.from_pylist([row], schema=self._schema))
        rows = [asdict(client) for client in clients]
        self._clients.append(pa.Table.from_pylist(rows, schema=CLIENT_SCHEMA))

    def save(self) -> None:
        """Write both files, each whole or not at all.

        Raises:
            RunError: the folder cannot be written.
        """
        for name, table in (("rounds", self.rounds), ("clients", self.clients)):
            sink = pa.BufferOutputStream()
            pq.write_table(table.combine_chunks(), sink)
            self._folder.write(f"{name}.parquet", sink.getvalue().to_pybytes())

    def restore(self, rounds: int) -> None:
        """Read the rows of the first `rounds` rounds back; later ones will be run again.

        Raises:
            RunFolderError: a file is missing or damaged, or rows are.
        """
        self._rounds = [_first(self._folder, "rounds", self._schema, rounds)]
        self._clients = [_first(self._folder, "clients", CLIENT_SCHEMA, rounds)]
        clients = set(self.clients["round"].to_pylist())
        if self.rounds["round"].to_pylist() != list(range(rounds)) or len(clients) != rounds:
            raise RunFolderError(
                f"{self._folder.location}: expected rounds.parquet and clients.parquet to have"
                f" rounds 0 to {rounds - 1}, as the checkpoint has, got {self.rounds.num_rows} and"
                f" {len(clients)} rounds"
            )


def _first(folder: RunFolder, name: str, schema: pa.Schema, rounds: int) -> pa.Table:
    if rounds == 0:
        return schema.empty_table()
    try:
        table = pq.read_table(pa.BufferReader(folder.read(f"{name}.parquet")))
        return table.filter(pc.field("round") < rounds).cast(schema)
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"cannot go on from {folder.location}/{name}.parquet: {error}"
        ) from None


def _proposal_row(proposal: Proposal | None) -> dict[str, Any]:
    return {
        column: None if proposal is None else getattr(proposal, attribute)
        for column, (attribute, _) in _PROPOSAL_COLUMNS.items()
    }
