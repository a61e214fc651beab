"""Texts from files of every format, and what is said of files that are not as they should be."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet

from rayfed_lora.data.dataset import load
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data, Partition

TASK = "text-classification"
ROWS = pa.table(
    {
        "text": [f'a, "quoted"\ntext {i}' for i in range(12)],
        "label": ["ham", "spam", "eggs"] * 4,
        "author": ["mia", "bob"] * 6,
    }
)


def write_stream(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_file(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "parquet": (".parquet", parquet.write_table),
    "csv": (".csv", csv.write_csv),
    "jsonl": (
        ".jsonl",
        lambda t, p: p.write_text("\n".join(json.dumps(row) for row in t.to_pylist())),
    ),
    "json lines": (
        ".json",
        lambda t, p: p.write_text("\n".join(json.dumps(row) for row in t.to_pylist())),
    ),
    "json array": (".json", lambda t, p: p.write_text(json.dumps(t.to_pylist(), indent=1))),
    "arrow file": (".arrow", write_file),
    "arrow stream": (".arrow", write_stream),
    "feather": (".feather", feather.write_feather),
    "upper-case extension": (".PARQUET", parquet.write_table),
}


def write_csv(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    return str(path)


def all_rows(dataset):
    return sorted(
        (row["text"], dataset.label_names[row["label"]])
        for table in (dataset.train, dataset.test)
        for row in table.to_pylist()
    )


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, form):
    suffix, write = WRITERS[form]
    path = tmp_path / f"rows{suffix}"
    write(ROWS, path)
    dataset = load(Data(source=str(path), test_fraction=0.25), TASK, 0, 0.0)
    expected = zip(ROWS["text"].to_pylist(), ROWS["label"].to_pylist(), strict=True)
    assert all_rows(dataset) == sorted(expected)
    assert dataset.label_names == ("eggs", "ham", "spam")
    # 3 of 12, stratified over 3 classes
    assert sorted(dataset.test["label"].to_pylist()) == [0, 1, 2]
    assert dataset.train.column_names == ["text", "label"]


def test_a_file_uri_is_opened(tmp_path):
    path = tmp_path / "with space.parquet"
    parquet.write_table(ROWS, path)
    assert load(Data(source=path.as_uri()), TASK, 0, 0.0).train.num_rows == 9  # ceil(2.4) = 3 off


def test_a_path_relative_to_the_home_folder_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parquet.write_table(ROWS, tmp_path / "rows.parquet")
    assert load(Data(source="~/rows.parquet"), TASK, 0, 0.0).train.num_rows == 9


def test_csv_texts_stay_texts_even_where_they_look_like_numbers_or_missing_values(tmp_path):
    source = write_csv(tmp_path, "text,label\n007,0\n1.50,1\nNA,0\nnull,1\n")
    dataset = load(Data(source=source, test_fraction=0.5), TASK, 0, 0.0)
    assert [text for text, _ in all_rows(dataset)] == ["007", "1.50", "NA", "null"]


def test_named_columns_are_taken_before_the_usual_names(tmp_path):
    path = tmp_path / "rows.parquet"
    table = ROWS.rename_columns(["said", "mood", "text"]).append_column("label", ROWS["author"])
    parquet.write_table(table, path)
    data = Data(source=str(path), text_column="said", label_column="mood")
    assert load(data, TASK, 0, 0.0).label_names == ("eggs", "ham", "spam")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"text_column": "body"}, r"need a column body, got the columns text, label, author"),
        ({"label_column": "mood"}, r"data\.label_column"),
        ({"partition": Partition(kind="column", column="user")}, r"data\.partition\.column"),
    ],
)
def test_an_absent_column_is_an_error_that_lists_the_columns(tmp_path, option, message):
    path = tmp_path / "rows.parquet"
    parquet.write_table(ROWS, path)
    with pytest.raises(DataError, match=message) as caught:
        load(Data(source=str(path), **option), TASK, 0, 0.0)
    assert "text, label, author" in str(caught.value)


def test_an_image_task_on_texts_is_an_error_that_lists_the_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(ROWS, path)
    with pytest.raises(DataError, match="image or img or pixels or pixel_values, got the columns"):
        load(Data(source=str(path)), "image-classification", 0, 0.0)


def test_a_column_that_is_there_twice_is_an_error(tmp_path):
    source = write_csv(tmp_path, "text,text,label\na,b,0\nc,d,1\n")
    with pytest.raises(DataError, match="need one column 'text', got several"):
        load(Data(source=source), TASK, 0, 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,x\n,y\n", r"column 'text': .* null in row 2"),
        ("text,label\na,x\nb,\nc,\n", r"column 'label': .* null in row 2 .*2 nulls"),
        ("text,label\na,0.5\nb,1.5\n", "got 0.5 in row 1: labels look like regression"),
        ("text,label\na,x\nb,x\n", "need at least 2 classes, got 1"),
        ("text,label\n", "empty table"),
        ("text,label\na,x\nb\n", "need a readable .csv file, got"),
        ("", "need a readable .csv file, got"),
    ],
)
def test_rows_that_cannot_be_used_are_an_error_that_names_them(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load(Data(source=write_csv(tmp_path, content)), TASK, 0, 0.0)
    assert "rows.csv" in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".json", ".jsonl"])
@pytest.mark.parametrize("content", [b"", b"garbage that is no table", b"[1, 2]", b"PAR1ARROW1"])
def test_an_unreadable_file_is_an_error_that_names_the_format(tmp_path, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"rows{suffix}.*need a readable {suffix} file, got"):
        load(Data(source=str(path)), TASK, 0, 0.0)


def test_texts_that_look_like_dates_stay_texts_in_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": f"text {i}", "label": f"2024-01-0{1 + i % 2}", "day": f"2024-02-0{1 + i % 3}"}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"kind": "column", "column": "day"}
    found = load(Data(source=str(path), partition=partition), TASK, 0, 0.0)
    assert found.label_names == ("2024-01-01", "2024-01-02")
    assert set(found.train["client"].to_pylist()) == {f"2024-02-0{i}" for i in (1, 2, 3)}


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_missing_file_is_an_error_that_says_so(tmp_path, prefix):
    with pytest.raises(DataError, match="there is no such file"):
        load(Data(source=f"{prefix}{tmp_path}/none.parquet"), TASK, 0, 0.0)


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "rows.parquet").mkdir()
    with pytest.raises(DataError, match=r"need a folder with tables .*; got no files"):
        load(Data(source=str(tmp_path / "rows.parquet")), TASK, 0, 0.0)


def test_an_unknown_uri_scheme_is_an_error():
    with pytest.raises(DataError, match=r"need a readable \.csv file, got"):
        load(Data(source="carrier-pigeon://coop/rows.csv"), TASK, 0, 0.0)


@pytest.mark.parametrize("source", ["rows.txt", "rows", "rows.xyz.gz", ""])
def test_a_source_of_no_known_form_is_an_error_that_lists_the_forms(source):
    with pytest.raises(
        DataError, match=r"digits, trec, vader, fashion-mnist.*\.parquet \.csv.*hf:<id>"
    ):
        load(Data(source=source), TASK, 0, 0.0)


def test_a_misspelt_built_in_name_is_an_error_that_offers_the_nearest():
    with pytest.raises(DataError, match="did you mean 'digits'"):
        load(Data(source="digit"), TASK, 0, 0.0)


def test_a_text_column_of_numbers_is_an_error(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": [1, 2], "label": [0, 1]}), path)
    with pytest.raises(DataError, match="column 'text': need text, got int64"):
        load(Data(source=str(path)), TASK, 0, 0.0)
