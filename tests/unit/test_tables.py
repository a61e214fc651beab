"""rounds.parquet and clients.parquet: columns, values, and going back to a checkpoint."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.federation.records import ClientRecord
from rayfed_lora.runs import client_rows
from rayfed_lora.runs.tables import Tables
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import Proposal
from tests.unit.test_status import record

MODULES = ["encoder.layer.0.q", "encoder.layer.0.v"]
# docs/design.md, "The run folder".
ROUND_COLUMNS = (
    "round stage rank ranks trainable_params proximal_weight clients failed_clients train_loss"
    " eval_accuracy eval_loss aggregation_error params_up params_down bytes_up bytes_down"
    " bytes_base seconds"
).split()
CLIENT_COLUMNS = "client examples train_loss status bytes_up bytes_down seconds".split()
PROPOSAL = Proposal(
    rank=1,
    verdict="rejected",
    energy_current=1.0,
    energy_proposed=1.5,
    temperature=0.25,
    probability=0.125,
    draw=0.75,
)


def client(t: int, number: int, failed: bool = False) -> ClientRecord:
    return ClientRecord(
        round=t,
        client=number,
        examples=number + 1,
        train_loss=None if failed else 0.5,
        status="failed" if failed else "ok",
        error="loss is nan" if failed else None,
        bytes_up=0 if failed else 40,
        bytes_down=80,
        seconds=0.25,
    )


def saved(rounds: int) -> dict[str, int]:
    """Return the numbers of rows that a checkpoint keeps of `filled` tables."""
    return {"rounds.parquet": rounds, "clients.parquet": 2 * rounds}


def filled(folder: RunFolder, rounds: int) -> Tables:
    tables = Tables(folder, MODULES)
    for t in range(rounds):
        row = replace(record(t), ranks={MODULES[0]: 2, MODULES[1]: 0})
        tables.add(row, [client(t, 0), client(t, 3, failed=True)])
    return tables


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def frame(folder: RunFolder, name: str) -> pd.DataFrame:
    return pd.read_parquet(BytesIO(folder.read(name)))


def test_the_columns_are_those_of_the_design_in_their_order_and_more_after_them(folder):
    filled(folder, 1).save()
    rounds = pq.read_schema(Path(folder.location) / "rounds.parquet").names
    clients = pq.read_schema(Path(folder.location) / "clients.parquet").names
    assert rounds[: len(ROUND_COLUMNS)] == ROUND_COLUMNS
    assert clients[0] == "round"
    assert [name for name in clients if name in CLIENT_COLUMNS] == CLIENT_COLUMNS


def test_pandas_reads_rounds_back_as_they_were(folder):
    filled(folder, 2).save()
    rounds = frame(folder, "rounds.parquet")
    assert rounds["round"].tolist() == [0, 1]
    row = rounds.iloc[1]
    expected = record(1)
    for name in ROUND_COLUMNS:
        if name not in ("ranks", "eval_accuracy", "eval_loss", "aggregation_error"):
            assert row[name] == getattr(expected, name)
    assert row["ranks"] == {MODULES[0]: 2, MODULES[1]: 0}
    assert rounds[["eval_accuracy", "eval_loss", "aggregation_error"]].isna().all(axis=None)
    assert row["learning_rate"] == 0.1


def test_pandas_reads_clients_back_as_they_were(folder):
    filled(folder, 2).save()
    clients = frame(folder, "clients.parquet")
    assert clients["round"].tolist() == [0, 0, 1, 1]
    assert clients["client"].tolist() == [0, 3, 0, 3]
    assert clients["examples"].tolist() == [1, 4, 1, 4]
    assert clients["status"].tolist() == ["ok", "failed"] * 2
    assert clients["error"].isna().tolist() == [True, False] * 2
    assert clients["error"][3] == "loss is nan"
    assert clients["train_loss"].isna().tolist() == [False, True] * 2
    assert clients["bytes_up"].tolist() == [40, 0] * 2


def test_a_full_model_round_has_no_rank_and_a_proposal_has_its_columns(folder):
    tables = Tables(folder, MODULES)
    tables.add(replace(record(0), rank=None, ranks=None), [])
    ranks = dict.fromkeys(MODULES, 2)
    tables.add(replace(record(1), ranks=ranks, proposal=PROPOSAL), [])
    full, proposed = tables.rounds.to_pylist()
    assert (full["rank"], full["ranks"], full["verdict"]) == (None, None, None)
    columns = {
        "proposed_rank": 1,
        "verdict": "rejected",
        "energy_current": 1.0,
        "energy_proposed": 1.5,
        "temperature": 0.25,
        "acceptance_probability": 0.125,
        "acceptance_draw": 0.75,
        "target_metric": None,
        "target_value": None,
    }
    assert {name: proposed[name] for name in columns} == columns


def test_counts_beyond_32_bits_are_kept(folder):
    tables = Tables(folder, MODULES)
    tables.add(replace(record(0), ranks=None, bytes_up=2**40, bytes_base=2**50), [])
    (row,) = tables.rounds.to_pylist()
    assert (row["bytes_up"], row["bytes_base"]) == (2**40, 2**50)


def test_new_tables_are_empty_and_have_all_columns(folder):
    tables = Tables(folder, MODULES)
    tables.save()
    assert (len(frame(folder, "rounds.parquet")), len(frame(folder, "clients.parquet"))) == (0, 0)


def test_going_back_drops_later_rounds_and_goes_on_from_there(folder, tmp_path):
    filled(folder, 4).save()
    tables = Tables(folder, MODULES)
    tables.restore(2, saved(2))
    assert frame(folder, "clients.parquet")["round"].tolist() == [0, 0, 1, 1]
    again = replace(record(2), ranks={MODULES[0]: 2, MODULES[1]: 0})
    tables.add(again, [client(2, 0), client(2, 3, failed=True)])
    tables.save()
    whole = RunFolder(tmp_path / "whole")
    filled(whole, 3).save()
    for name in ("rounds.parquet", "clients.parquet"):
        pd.testing.assert_frame_equal(frame(folder, name), frame(whole, name))


def test_saving_after_each_round_gives_the_file_that_one_save_gives(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(client_rows, "_ROW_GROUP", 3)
    tables = Tables(folder, MODULES)
    for t in range(7):
        tables.add(replace(record(t), ranks=None), [client(t, 0), client(t, 3, failed=True)])
        tables.save()
        assert len(frame(folder, "clients.parquet")) == 2 * (t + 1)
    groups = pq.ParquetFile(Path(folder.location) / "clients.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [3, 3, 3, 3, 2]
    whole = RunFolder(tmp_path / "whole")
    filled(whole, 7).save()
    name = "clients.parquet"
    pd.testing.assert_frame_equal(frame(folder, name), frame(whole, name))


def test_many_rows_do_not_wait_for_a_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(client_rows, "_WAITING", 5)
    tables = filled(folder, 2)
    assert not folder.exists("clients.parquet")
    tables.add(record(2), [client(2, 0), client(2, 1)])
    assert len(frame(folder, "clients.parquet")) == 6
    # A checkpoint of round 1 is still a place to go back to.
    tables = Tables(folder, MODULES)
    filled(folder, 2).save()
    tables.restore(1, saved(1))
    assert frame(folder, "clients.parquet")["round"].tolist() == [0, 0]


def test_a_write_that_fails_keeps_the_file_and_the_rows(folder, monkeypatch):
    tables = filled(folder, 1)
    tables.save()
    tables.add(replace(record(1), ranks=None), [client(1, 0)])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left"):
            tables.save()
    assert len(frame(folder, "clients.parquet")) == 2
    tables.save()
    assert frame(folder, "clients.parquet")["round"].tolist() == [0, 0, 1]


def test_going_back_to_the_start_needs_no_files(folder):
    tables = filled(folder, 1)
    tables.restore(0, saved(0))
    assert tables.rounds.num_rows == 0


def test_rounds_that_the_checkpoint_has_and_the_table_lacks_are_an_error(folder):
    filled(folder, 2).save()
    with pytest.raises(RunFolderError, match="it has 2 rounds, the checkpoint knows of 3"):
        Tables(folder, MODULES).restore(3, saved(3))


@pytest.mark.parametrize("name", ["rounds", "clients"])
def test_a_file_that_is_missing_is_an_error_that_names_it(folder, name):
    filled(folder, 2).save()
    folder.remove(f"{name}.parquet")
    with pytest.raises(RunFolderError, match=f"{name}.parquet"):
        Tables(folder, MODULES).restore(2, saved(2))


@pytest.mark.parametrize("name", ["rounds", "clients"])
def test_a_file_that_is_cut_short_is_an_error_that_names_it(folder, name):
    filled(folder, 2).save()
    folder.write(f"{name}.parquet", folder.read(f"{name}.parquet")[:-20])
    with pytest.raises(RunFolderError, match=f"{name}.parquet"):
        Tables(folder, MODULES).restore(2, saved(2))


def test_a_file_with_other_columns_is_an_error(folder):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"round": [0, 1]}), sink)
    folder.write("rounds.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(RunFolderError, match=r"rounds\.parquet"):
        Tables(folder, MODULES).restore(2, saved(2))
