"""Clients that the data name: in tables, messages, reports and traces, and over a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

import rayfed_lora
from rayfed_lora.data.traces import read_trace
from rayfed_lora.data.workload import Workload, with_fingerprint
from rayfed_lora.engines.factory import in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.errors import ClientError, DataError, RunFolderError
from rayfed_lora.pages.report import report_html
from rayfed_lora.printable import client_label
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints, restored
from rayfed_lora.runs.reading import read_run
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from rayfed_lora.training.preparing import outline, prepare
from tests.fakes import Behaviour, FakeFactory, every_round, make_recipe

NAMES = ("mia", "bob", "<b>eve</b>", "7", "é", "zoë")


@dataclass(frozen=True)
class NamedFactory(FakeFactory):
    """A fake whose data name the clients, or differ otherwise from another's."""

    names: tuple[str, ...] | None = NAMES
    changes: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: bool = True

    def workload(self, recipe: Recipe) -> Workload:
        names = None if self.names is None else pa.array(self.names)
        workload = replace(super().workload(recipe), client_names=names, **self.changes)
        return with_fingerprint(workload) if self.fingerprint else workload


def executor(recipe: Recipe, factory: FakeFactory) -> LocalEngine:
    return LocalEngine(lambda: in_process(recipe, factory, "cpu"))


def stopped(folder: Path, factory: FakeFactory, rounds: int) -> None:
    """Run so many rounds into a folder."""
    recipe = make_recipe()
    board = StatusBoard(recipe.annealing.total_rounds)
    place = RunFolder(str(folder))
    going = simulate_rounds(
        recipe, executor(recipe, factory), place, board, lambda: False, resume=True
    )
    for tables in going:
        if tables.rounds.num_rows == rounds:
            going.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a client that always fails, and tests on clients."""
    folder = tmp_path_factory.mktemp("run")
    recipe = make_recipe(evaluation__client_fraction=0.5)
    factory = NamedFactory(Behaviour(failing=every_round(2)))
    rayfed_lora.run(recipe, str(folder), factory=factory)
    return folder


@pytest.mark.parametrize("table", ["clients", "client_metrics", "partition"])
def test_tables_of_clients_have_the_names_beside_the_numbers(run, table):
    rows = pd.read_parquet(run / f"{table}.parquet")
    assert len(rows) > 0
    assert rows["client"].dtype == np.int64
    assert rows["client_name"].tolist() == [NAMES[client] for client in rows["client"]]


@pytest.mark.parametrize("table", ["clients", "partition"])
def test_clients_without_names_have_no_column_of_names(table, tmp_path):
    rayfed_lora.run(make_recipe(), str(tmp_path), factory=FakeFactory())
    assert "client_name" not in pd.read_parquet(tmp_path / f"{table}.parquet")


def test_notes_and_report_say_which_client_failed(run):
    found = read_run(RunFolder(str(run)))
    reason = "loss is nan in local step 1 of 1"
    expected = f"client 2 ('<b>eve</b>') failed: {reason}"
    assert expected in found.notes["text"].tolist()
    page = report_html([found])
    assert "2 (&#39;&lt;b&gt;eve&lt;/b&gt;&#39;)" in page
    # in the table of failures only
    assert f"failed: {reason}" not in page


def test_a_client_that_raises_is_named_by_its_value(tmp_path):
    recipe = make_recipe(clients__per_round=6)
    factory = NamedFactory(Behaviour(raising=frozenset({(1, 0)})))
    with pytest.raises(ClientError, match=r"client 1 \('bob'\) failed in round 1") as raised:
        rayfed_lora.run(recipe, str(tmp_path), factory=factory)
    assert (raised.value.client, raised.value.reason) == (
        1,
        "ValueError: the fake client 1 was told to raise",
    )


def test_control_characters_of_a_name_are_written_out():
    assert client_label(0, ["\x1b[31mred"]) == "client 0 ('\\x1b[31mred')"


def test_a_run_goes_on_with_the_same_data(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    stopped(whole, NamedFactory(), 99)
    stopped(halves, NamedFactory(), 3)
    stopped(halves, NamedFactory(), 99)
    for table in ("clients", "partition"):
        one, two = (pd.read_parquet(f / f"{table}.parquet") for f in (whole, halves))
        pd.testing.assert_frame_equal(
            one.drop(columns="seconds", errors="ignore"),
            two.drop(columns="seconds", errors="ignore"),
        )
    assert (halves / "summary.json").exists()


def spoilt(part: str) -> dict[str, Any]:
    """Return a workload's part with one value changed."""
    workload = FakeFactory().workload(make_recipe())
    if part == "clients":
        order = workload.clients.order.copy()
        order[[0, 1]] = order[[1, 0]]
        return {part: replace(workload.clients, order=order)}
    examples = getattr(workload, part)
    pixels, labels = examples.inputs["pixel_values"].copy(), examples.labels.copy()
    if part == "train":
        pixels[4, 0, 1, 1] = 0.5
    else:
        labels[2] = 1
    return {part: examples.of({"pixel_values": pixels}, labels)}


CHANGED: dict[str, tuple[NamedFactory, str]] = {
    "a training image": (NamedFactory(changes=spoilt("train")), "training examples"),
    "a test label": (NamedFactory(changes=spoilt("test")), "test examples"),
    "whose an example is": (NamedFactory(changes=spoilt("clients")), "examples of each client"),
    "the order of two clients": (
        NamedFactory(names=("bob", "mia", *NAMES[2:])),
        "names of clients",
    ),
    "no names": (NamedFactory(names=None), "names of clients"),
    "a class": (NamedFactory(changes={"label_names": ("no", "maybe")}), "names of classes"),
    "a device": (NamedFactory(changes={"columns": {"pace": np.ones(6)}}), "devices of clients"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_does_not_go_on_with_other_data_and_says_what_differs(change, tmp_path):
    factory, part = CHANGED[change]
    stopped(tmp_path, NamedFactory(), 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    expected = rf"not those that the run began with; these differ: {part}; start anew"
    with pytest.raises(RunFolderError, match=expected):
        stopped(tmp_path, factory, 99)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_does_not_know_its_data_is_rejected(tmp_path):
    stopped(tmp_path, NamedFactory(fingerprint=False), 3)
    snapshot = checkpoints.newest(RunFolder(str(tmp_path)), lambda text: None)
    old = replace(snapshot, facts={k: v for k, v in snapshot.facts.items() if k != "data"})
    population = executor(load_recipe(make_recipe()), NamedFactory()).open()
    assert "an earlier version wrote it" in restored.changed_data(old, population)


IMAGES = {"architecture": "vit", "hidden_size": 8, "num_hidden_layers": 1, "patch_size": 2}


def columns(owners: list[Any]) -> dict[str, Any]:
    """Return 12 rows for each owner: images of two by two pixels, two classes."""
    rows = 12 * len(owners)
    pixels = np.arange(rows * 4, dtype=np.float32).reshape(rows, 2, 2) / (rows * 4)
    return {
        "image": pixels.tolist(),
        "label": [i % 2 for i in range(rows)],
        "who": [owner for owner in owners for _ in range(12)],
    }


def recipe_of(table: Mapping[str, Any], folder: Path, **overrides: Any) -> Recipe:
    path = folder / "rows.parquet"
    parquet.write_table(pa.table(dict(table)), path)
    given = {
        "data": {"source": str(path), "partition": {"kind": "column", "column": "who"}},
        "model": {"config": {**IMAGES, "num_attention_heads": 2, "intermediate_size": 8}},
        "annealing": {"heating": {"rank": 2}},
        "clients": {"per_round": 2},
    }
    return load_recipe(given, {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.mark.parametrize("kind", [str, int])
def test_clients_are_numbered_in_the_order_of_whole_numbers(kind, tmp_path):
    owners = [kind(n) for n in (0, 1, 10, 11, 2)]
    workload = prepare(recipe_of(columns(owners), tmp_path))
    assert workload.client_names.to_pylist() == ["0", "1", "2", "10", "11"]
    # pixels rise with the rows, and the rows of 2 stand last: client 2 has the brightest images
    means = [
        float(workload.train.inputs["pixel_values"][workload.clients.examples(k)].mean())
        for k in range(5)
    ]
    assert np.argsort(means).tolist() == [0, 1, 3, 4, 2]


def test_the_fingerprint_of_the_same_file_is_the_same_and_of_a_changed_one_another(tmp_path):
    rows = columns(["a", "b"])
    first = prepare(recipe_of(rows, tmp_path)).fingerprint
    assert prepare(recipe_of(rows, tmp_path)).fingerprint == first
    rows["image"][3][1][1] += 0.25
    changed = prepare(recipe_of(rows, tmp_path)).fingerprint
    differing = {part for part in first if first[part] != changed[part]}
    assert differing in ({"training examples"}, {"test examples"})


def trace_of(folder: Path, clients: list[Any], suffix: str) -> str:
    path = folder / f"times{suffix}"
    rows = {"client": clients, "start_s": [0.0] * len(clients), "end_s": [5.0] * len(clients)}
    if suffix == ".csv":
        lines = "".join(f"{client},0,5\n" for client in clients)
        path.write_text(f"client,start_s,end_s\n{lines}")
    else:
        parquet.write_table(pa.table(rows), path)
    return str(path)


@pytest.mark.parametrize(
    ("clients", "suffix"),
    [(["10", "007", "2"], ".csv"), (["10", "007", "2"], ".parquet")],
)
def test_a_trace_names_clients_as_the_data_do(clients, suffix, tmp_path):
    names = ["007", "10", "2"]
    trace = read_trace(trace_of(tmp_path, clients, suffix), 3, None, names)
    assert trace.client.tolist() == [0, 1, 2]
    one = read_trace(trace_of(tmp_path, ["10"], suffix), 3, None, names)
    assert one.client.tolist() == [1]


def test_a_trace_of_numbers_names_clients_of_numbers(tmp_path):
    names = ["0", "1", "2", "10", "11"]
    trace = read_trace(trace_of(tmp_path, [10, 2], ".parquet"), 5, None, names)
    assert trace.client.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("names", "clients", "expected"),
    [
        # A column with gaps, as pandas writes its numbers.
        (["1", "2", "10"], ["10.0", "1.0"], [0, 2]),
        (["1", "2", "10"], [" 10", "1"], [0, 2]),
        # Texts, since 07 is no number: names as they stand win.
        (["07", "7.0"], ["7.0"], [1]),
    ],
)
def test_clients_of_a_csv_trace_are_numbers_as_those_of_csv_data_are(
    names, clients, expected, tmp_path
):
    trace = read_trace(trace_of(tmp_path, clients, ".csv"), len(names), None, names)
    assert trace.client.tolist() == expected


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (
            ["mia", "ann"],
            r"as data.partition.column names them .*'mia', 'bob'.* got 'ann' in row 2",
        ),
        (["mia", ""], "column 'client': need a value in every row, got null in row 2"),
        (["gone"], "need rows of clients with training examples, got none"),
    ],
)
def test_a_trace_of_a_client_that_is_not_in_the_data_is_an_error(clients, message, tmp_path):
    source = trace_of(tmp_path, clients, ".csv")
    with pytest.raises(DataError, match=message) as raised:
        read_trace(source, 2, None, ["mia", "bob"], ["mia", "bob", "gone"])
    assert "clients.availability.trace" in str(raised.value)


def test_rows_of_a_client_whose_examples_are_all_kept_for_the_test_are_passed_over(tmp_path):
    source = trace_of(tmp_path, ["gone", "bob"], ".csv")
    trace = read_trace(source, 2, None, ["mia", "bob"], ["mia", "bob", "gone"])
    assert trace.client.tolist() == [1]


def test_without_a_column_of_clients_a_trace_has_their_numbers(tmp_path):
    assert read_trace(trace_of(tmp_path, ["2"], ".csv"), 3, None).client.tolist() == [2]


def test_a_recipes_trace_is_read_with_the_names_of_its_data(tmp_path):
    trace = trace_of(tmp_path, ["10"], ".csv")
    recipe = recipe_of(columns(["2", "10"]), tmp_path, clients__availability=trace)
    assert outline(recipe).devices.trace.client.tolist() == [1]


def test_notes_on_names_reach_the_plan_and_the_run(tmp_path):
    recipe = recipe_of(columns(["mia", "Mia"]), tmp_path)
    expected = "clients of column 'who' that differ only in case, in surrounding spaces, or in"
    assert any(expected in note for note in outline(recipe).notes)
    assert any(expected in note for note in prepare(recipe).notes)
