"""Whatever a data file holds: a data set, or an error of our own."""

from __future__ import annotations

import gzip
import json
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import csv, parquet

from rayfed_lora.data import dataset
from rayfed_lora.data.traces import read_trace
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data
from rayfed_lora.types import AvailabilityTrace
from tests.property.test_hostile_checkpoints import damage

QUICK = settings(max_examples=40, deadline=None)
SUFFIXES = (".parquet", ".csv", ".tsv", ".csv.gz", ".jsonl", ".json", ".arrow")
TEXTS, IMAGES = "text-classification", "image-classification"


@cache
def contents() -> dict[tuple[str, str], bytes]:
    """Return whole files by suffix and task."""
    labels = [i % 3 for i in range(12)]
    texts = pa.table({"text": [f"text {i}, “quoted”" for i in labels], "label": labels})
    pixels = np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2).tolist()
    images = pa.table({"image": pixels, "label": labels})
    found = {}
    for task, table in ((TEXTS, texts), (IMAGES, images)):
        for suffix in SUFFIXES:
            if task != IMAGES or suffix not in (".csv", ".tsv", ".csv.gz"):
                found[suffix, task] = written(table, suffix)
    return found


def written(table: pa.Table, suffix: str) -> bytes:
    out = BytesIO()
    if suffix == ".parquet":
        parquet.write_table(table, out)
    elif suffix in (".csv", ".tsv", ".csv.gz"):
        csv.write_csv(table, out, csv.WriteOptions(delimiter="\t" if suffix == ".tsv" else ","))
        return gzip.compress(out.getvalue()) if suffix == ".csv.gz" else out.getvalue()
    elif suffix == ".arrow":
        with pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    else:
        rows = table.to_pylist()
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        return text.encode()
    return out.getvalue()


def loaded(content: bytes, suffix: str, task: str, **options: Any) -> dataset.Dataset | None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}"
        path.write_bytes(content)
        try:
            return dataset.load(Data(source=str(path), **options), task, 0, 0.0)
        except DataError as error:
            assert str(error)
            return None


@pytest.mark.parametrize("kind", sorted(contents()))
def test_the_whole_files_are_data_sets(kind: tuple[str, str]) -> None:
    assert loaded(contents()[kind], *kind) is not None


@QUICK
@given(data=st.data(), kind=st.sampled_from(sorted(contents())))
def test_a_damaged_file_is_a_data_set_or_refused(
    data: st.DataObject, kind: tuple[str, str]
) -> None:
    content = contents()[kind]
    for _ in range(data.draw(st.integers(1, 3))):
        content = data.draw(damage(content))
    loaded(content, *kind)


@QUICK
@given(
    content=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode())),
    suffix=st.sampled_from(SUFFIXES),
)
def test_a_file_of_any_bytes_is_a_data_set_or_refused(content: bytes, suffix: str) -> None:
    for task in (TEXTS, IMAGES):
        loaded(content, suffix, task)


TRACE = b"client,start_s,end_s\n0,0.0,10.5\n1,3.0,4.0\n0,20.0,30.0\n"


def traced(content: bytes, suffix: str) -> AvailabilityTrace | None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"trace{suffix}"
        path.write_bytes(content)
        try:
            return read_trace(str(path), 2, 40.0)
        except DataError as error:
            assert str(error)
            return None


@QUICK
@given(data=st.data(), suffix=st.sampled_from([".csv", ".parquet"]))
def test_a_damaged_trace_is_a_trace_or_refused(data: st.DataObject, suffix: str) -> None:
    content = TRACE
    if suffix == ".parquet":
        content = written(csv.read_csv(BytesIO(TRACE)), suffix)
    assert traced(content, suffix) is not None
    found = traced(data.draw(damage(content)), suffix)
    if found is not None:
        assert (found.start_s < found.end_s).all() and (found.end_s <= 40).all()


@QUICK
@given(content=st.text(st.sampled_from('client,start_s end0123456789.-+einfNaN\n"'), max_size=60))
def test_a_trace_of_any_signs_is_a_trace_or_refused(content: str) -> None:
    traced(b"client,start_s,end_s\n" + content.encode(), ".csv")
    traced(content.encode(), ".csv")


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


@QUICK
@example(rows=[{"text": 2**63}])
@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "image", "label"]), VALUES)))
def test_json_rows_of_any_values_are_a_data_set_or_refused(rows: list[dict[str, Any]]) -> None:

    for suffix, text in (
        (".json", json.dumps(rows)),
        (".jsonl", "\n".join(map(json.dumps, rows))),
    ):
        for task in (TEXTS, IMAGES):
            loaded(text.encode(), suffix, task)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_nested_without_end_is_refused(suffix: str) -> None:
    assert loaded(b"[" * 100_000 + b"]" * 100_000, suffix, TEXTS) is None
    for levels in (200, 100_000):
        deep = b'{"text":' * levels + b"1" + b"}" * levels
        assert loaded(deep, suffix, TEXTS) is None
        assert loaded(b"[" + deep + b"]", suffix, TEXTS) is None


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_brackets_in_texts_are_no_levels(suffix: str) -> None:
    rows = [{"text": '[{"\\' * 500, "label": i % 2} for i in range(10)]
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    assert loaded(text.encode(), suffix, TEXTS) is not None


@pytest.mark.parametrize(
    "source",
    ["a\0.csv", "s3://bucket/a\0.csv", "nosuch://a.csv", "x" * 5000 + ".csv", "s3:///a.csv"],
)
def test_a_source_that_cannot_be_is_refused(source: str) -> None:
    with pytest.raises(DataError):
        dataset.load(Data(source=source), TEXTS, 0, 0.0)
