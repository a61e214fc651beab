"""Killed runs of versions without checksums and client names go on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

import rayfed_lora
from rayfed_lora import checksums
from rayfed_lora.errors import RunFolderError
from rayfed_lora.reporting.status import StatusBoard
from rayfed_lora.runtime.session import sitting
from rayfed_lora.storage import RunFolder
from tests.fakes import make_recipe
from tests.property.test_hostile_tables import FAILING, as_older_versions_wrote
from tests.unit.test_client_names import NamedFactory, executor

NAMED = ("clients", "client_metrics", "partition")
# An older version numbered clients in the order of their texts.
FACTORY = NamedFactory(FAILING, names=("a", "b", "c", "d", "e", "f"), fingerprint=False)
RECIPE = make_recipe(
    evaluation__client_fraction=0.5, evaluation__clients_every=1, clients__max_failed=1
)


def killed(folder: Path) -> None:
    """Leave what the former version leaves when it is killed after three rounds."""
    board = StatusBoard(6)
    place = RunFolder(folder)
    going = sitting(RECIPE, executor(RECIPE, FACTORY), place, board, lambda: False, resume=True)
    for tables in going:
        if tables.rounds.num_rows == 3:
            going.close()
    for name in NAMED:
        path = folder / f"{name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns("client_name"), path)
    as_older_versions_wrote(place)


def test_a_killed_run_of_named_clients_goes_on_and_gets_its_names(tmp_path: Path) -> None:
    rayfed_lora.run(RECIPE, str(tmp_path / "whole"), factory=FACTORY)
    killed(tmp_path / "run")
    rayfed_lora.run(RECIPE, str(tmp_path / "run"), resume=True, factory=FACTORY)
    assert checksums.faults(RunFolder(tmp_path / "run")) == {}
    for name in NAMED:
        found, expected = (
            pd.read_parquet(tmp_path / run / f"{name}.parquet").drop(
                columns="seconds", errors="ignore"
            )
            for run in ("run", "whole")
        )
        assert found["client_name"].notna().all()
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_a_client_that_the_data_do_not_have_is_named_as_damage(tmp_path: Path) -> None:
    killed(tmp_path)
    path = tmp_path / "clients.parquet"
    rows = pq.read_table(path)
    numbers = [number + 6 for number in rows["client"].to_pylist()]
    pq.write_table(rows.set_column(1, rows.schema.field("client"), [numbers]), path)
    with pytest.raises(RunFolderError, match=r"clients\.parquet"):
        rayfed_lora.run(RECIPE, str(tmp_path), resume=True, factory=FACTORY)
