"""Several files, folders, patterns, test sources, and images in files of their own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet

from rayfed_lora.data.dataset import Dataset, load
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data, Partition

TEXTS, IMAGES = "text-classification", "image-classification"
LABELS = ["ham", "spam"]


def part(first: int, rows: int = 6) -> pa.Table:
    """Return rows `text i`, whose class is the parity of i."""
    numbers = range(first, first + rows)
    return pa.table(
        {"text": [f"text {i}" for i in numbers], "label": [LABELS[i % 2] for i in numbers]}
    )


def write(path: Path, table: pa.Table) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(source: Any, task: str = TEXTS, **options: Any) -> Dataset:
    return load(Data(source=source, **options), task, 0, 0.0)


def numbers(*tables: pa.Table) -> list[int]:
    """Return the i of each row, and check that each row has the label of its text."""
    rows = [row for table in tables for row in table.to_pylist()]
    found = sorted((int(row["text"].removeprefix("text ")), row["label"]) for row in rows)
    assert all(label == i % 2 for i, label in found)
    return [i for i, _ in found]


def all_of(dataset: Dataset) -> list[int]:
    return numbers(dataset.train, dataset.test)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".jsonl.gz", ".feather"])
def test_a_list_a_pattern_and_a_folder_of_shards_give_the_same_rows_in_one_order(tmp_path, suffix):
    paths = [write(tmp_path / "rows" / f"part-{i}{suffix}", part(6 * i)) for i in range(3)]
    listed = read(paths)
    assert all_of(listed) == list(range(18))
    for source in (
        str(tmp_path / "rows"),
        str(tmp_path / "rows" / f"part-*{suffix}"),
        str(tmp_path / "r*s" / "part-[012]*"),
        (tmp_path / "rows").as_uri(),
        [paths[0], str(tmp_path / "rows" / f"part-[12]{suffix}")],
    ):
        found = read(source)
        assert found.train.equals(listed.train) and found.test.equals(listed.test)


def test_a_folder_as_spark_writes_it_is_read_without_its_markers(tmp_path):
    for i in range(2):
        write(tmp_path / "rows.parquet" / f"part-0000{i}.parquet", part(6 * i))
    (tmp_path / "rows.parquet" / "_SUCCESS").touch()
    (tmp_path / "rows.parquet" / ".part-00000.parquet.crc").touch()
    write(tmp_path / "rows.parquet" / "_temporary" / "0.parquet", part(100))
    found = read(str(tmp_path / "rows.parquet"))
    assert all_of(found) == list(range(12))
    assert len(found.notes) == 1 and "not read" in found.notes[0] and "_SUCCESS" in found.notes[0]


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.parquet", "train-1.parquet", "test-0.parquet", "validation-0.parquet"),
        ("data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet", "data/dev.parquet"),
        ("train/0.parquet", "train/1.parquet", "test/0.parquet", "val/0.parquet"),
    ],
)
def test_splits_that_the_names_of_files_say_are_not_mixed(tmp_path, names):
    for i, name in enumerate(names):
        write(tmp_path / name, part(6 * i))
    found = read(str(tmp_path))
    assert (numbers(found.train), numbers(found.test)) == (list(range(12)), list(range(12, 18)))
    assert found.official_test
    assert "validation split are not read" in found.notes[0]
    other = read(str(tmp_path / names[0]), test_source=str(tmp_path))
    assert numbers(other.test) == list(range(12, 18))


def test_a_test_source_is_the_test_split_and_nothing_is_cut_off(tmp_path):
    train = write(tmp_path / "train.csv", part(0, 10))
    one, two = (write(tmp_path / f"t{i}.jsonl", part(10 + 2 * i, 2)) for i in (0, 1))
    for source in ([one, two], str(tmp_path / "t?.jsonl")):
        found = read(train, test_source=source, test_fraction=0.5)
        assert numbers(found.train) == list(range(10))
        assert numbers(found.test) == [10, 11, 12, 13]
        assert found.official_test


def test_a_test_source_replaces_the_test_split_of_the_source(tmp_path):
    write(tmp_path / "a" / "train.csv", part(0))
    write(tmp_path / "a" / "test.csv", part(6))
    own = write(tmp_path / "own.csv", part(12))
    found = read(str(tmp_path / "a"), test_source=own)
    assert (numbers(found.train), numbers(found.test)) == (list(range(6)), list(range(12, 18)))
    assert "its test split gives way to data.test_source" in found.notes[0]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["07", "7", "07", "7"], ["7"], "7"),  # all of the test labels are whole numbers
        (["1", "2", "1", "2"], ["2.0"], "2"),
        (["True", "False", "True", "False"], ["true"], "true"),
    ],
)
def test_labels_of_a_test_source_in_csv_are_read_as_those_of_the_source(
    tmp_path, train, test, expected
):
    for name, labels in (("train", train), ("test", test)):
        rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    found = read(str(tmp_path / "train.csv"), test_source=str(tmp_path / "test.csv"))
    assert [found.label_names[i] for i in found.test["label"].to_pylist()] == [expected]


def test_labels_over_several_csv_files_are_numbers_only_where_all_are(tmp_path):
    for name, labels in (("a", ["7", "8"] * 3), ("b", ["07", "8"] * 3)):
        rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    assert read(str(tmp_path / "*.csv")).label_names == ("07", "7", "8")


def test_a_column_that_no_key_names_may_differ_between_files(tmp_path):
    one = part(0).append_column("id", pa.array(range(6)))
    two = (
        part(6).append_column("id", pa.array(list("abcdef"))).append_column("x", pa.array([0] * 6))
    )
    paths = [write(tmp_path / f"{i}.parquet", table) for i, table in enumerate((one, two))]
    assert all_of(read(paths)) == list(range(12))


# What stands in a folder, by name; the source; the message.
ODD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "a pattern that matches nothing": ({"a.csv": part(0)}, "*.parquet", "none matches it"),
    "a pattern of all depths": ({"a.csv": part(0)}, "**/*.csv", r"'\*' for each level"),
    "a pattern that matches a text": (
        {"a.csv": part(0), "README.md": "x"},
        "*",
        "need a pattern that only tables match, got READ",
    ),
    "a list of nothing there": ({"a.csv": part(0)}, ["a.csv", "b.csv"], "b.csv.* no such file"),
    "a file twice": ({"a.csv": part(0)}, ["a.csv", "*.csv"], "every file once, got .*a.csv twice"),
    "a built-in name in a list": ({"a.csv": part(0)}, ["a.csv", "digits"], "'.*digits': need a"),
    "an empty folder": ({"sub/": ""}, "sub", "got no files"),
    "a folder without tables": ({"sub/a.doc": "x"}, "sub", "need a folder with tables .*got a.doc"),
    "two formats": (
        {"sub/a.csv": part(0), "sub/b.parquet": part(6)},
        "sub",
        "files of one format, got a.csv, b.parquet",
    ),
    "one format and the hub's description": (
        {"sub/a.parquet": part(0), "sub/dataset_infos.json": "{}"},
        "sub",
        "files of one format",
    ),
    "a split and a file of none": (
        {"sub/test.csv": part(0), "sub/rows.csv": part(6)},
        "sub",
        r"test.csv is of a split .* rows.csv is of none.*data\.test_source",
    ),
    "no training split": (
        {"sub/test.csv": part(0)},
        "sub",
        "need files of a split `train`, got test",
    ),
    "two splits in a name": (
        {"sub/train/test.csv": part(0)},
        "sub",
        "could be of the splits train and test",
    ),
    "folders whose names say something": (
        {"sub/year=2020/a.parquet": part(0), "sub/year=2021/a.parquet": part(6)},
        "sub",
        r"names of the folders would be lost.*\*/\*\.parquet",
    ),
    "a column that one file lacks": (
        {"a.csv": part(0), "b.csv": part(6).drop_columns(["label"])},
        ["a.csv", "b.csv"],
        "same columns in all files, got label only in .*a.csv, and not in .*b.csv",
    ),
    "labels of two types": (
        {"a.parquet": part(0), "b.parquet": pa.table({"text": ["a"], "label": [1]})},
        ["a.parquet", "b.parquet"],
        r"b.parquet', column 'label': need the type that it has in .*a.parquet, got string and int",
    ),
    "a null in the second file": (
        {"a.csv": part(0), "b.csv": pa.table({"text": ["a", None], "label": LABELS})},
        ["a.csv", "b.csv"],
        "column 'text': .* null in row 2 of .*b.csv",
    ),
    "a fraction in the second file": (
        {
            "a.csv": pa.table({"text": ["a"], "label": ["1"]}),
            "b.csv": pa.table({"text": ["a", "b"], "label": ["2", "0.5"]}),
        },
        ["a.csv", "b.csv"],
        "got 0.5 in row 2 of .*b.csv",
    ),
    "a folder with a damaged shard": (
        {"sub/a.parquet": part(0), "sub/b.parquet": "x"},
        "sub",
        r"b.parquet.*readable \.parquet",
    ),
    "saved by datasets, damaged": ({"sub/state.json": "{"}, "sub", "datasets.save_to_disk"),
    "saved by datasets, index lost": (
        {"sub/state.json": '{"_data_files": []}', "sub/dataset_info.json": '{"features": {}}'},
        "sub",
        "without names of data files",
    ),
    "saved by datasets, a file lost": (
        {
            "sub/state.json": '{"_data_files": [{"filename": "d.arrow"}]}',
            "sub/dataset_info.json": '{"features": {}}',
        },
        "sub",
        "d.arrow.*no such file",
    ),
    "saved by datasets, a file outside": (
        {
            "sub/state.json": '{"_data_files": [{"filename": "../d.arrow"}]}',
            "sub/dataset_info.json": '{"features": {}}',
        },
        "sub",
        "a name inside the folder",
    ),
    "saved by datasets, no such split": (
        {"sub/dataset_dict.json": '{"splits": []}'},
        "sub",
        "need a split `train`",
    ),
    "images outside of class folders": ({"sub/a.png": "x"}, "sub", "in a subfolder for each class"),
    "images and a table": (
        {"sub/a/a.png": "x", "sub/meta.csv": part(0)},
        "sub",
        r"set data\.source to .*sub/meta.csv and data\.image_column",
    ),
    "image classes and a split": (
        {"sub/train/a/a.png": "x", "sub/cat/a.png": "x"},
        "sub",
        "train is a split by its name and cat is none",
    ),
    "images of a split without classes": (
        {"sub/train/a.png": "x"},
        "sub",
        "train/a.png in a subfolder for its class",
    ),
    "images in a list": (
        {"sub/a/a.png": "x", "a.csv": part(0)},
        ["sub", "a.csv"],
        "tables in a list, got images",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_and_folders_are_an_error_that_names_them(kind, tmp_path):
    files, source, message = ODD[kind]
    for name, content in files.items():
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir()
        elif isinstance(content, str):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(content)
        else:
            write(path, content)
    place = [str(tmp_path / s) for s in source] if isinstance(source, list) else tmp_path / source
    with pytest.raises(DataError, match=message):
        read(place)


@pytest.mark.parametrize("test", ["rows.csv", "../{}/rows.csv", "*.csv"])
def test_a_test_source_that_is_trained_on_is_an_error(tmp_path, test):
    write(tmp_path / "rows.csv", part(0))
    with pytest.raises(DataError, match=r"not trained on, got .*rows.csv of data\.source"):
        read(str(tmp_path), test_source=str(tmp_path / test.format(tmp_path.name)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            pa.table({"text": ["a"], "mood": ["ham"]}),
            "test_source .*test.csv': need a column label",
        ),
        (pa.table({"text": ["a"], "label": ["eggs"]}), "test_source .*test.csv': .* got eggs"),
        (
            pa.table({"text": ["a", None], "label": LABELS}),
            "test_source .*'text': .* null in row 2",
        ),
        (part(0, 0), "test_source .*need rows"),
    ],
)
def test_messages_on_a_test_source_name_its_key(tmp_path, table, message):
    train, test = write(tmp_path / "train.csv", part(0)), write(tmp_path / "test.csv", table)
    with pytest.raises(DataError, match=message):
        read(train, test_source=test)


def test_clients_and_columns_of_numbers_go_over_all_files(tmp_path):
    tables = [
        part(6 * i)
        .append_column("who", pa.array([f"c{i}", "both"] * 3))
        .append_column("pace", pa.array([i + 1] * 6))
        for i in (0, 1)
    ]
    paths = [write(tmp_path / f"{i}.csv", table) for i, table in enumerate(tables)]
    data = Data(source=paths, partition=Partition(kind="column", column="who"))
    found = load(data, TEXTS, 0, 0.0, ("pace",))
    assert found.clients == ("both", "c0", "c1")
    for row in found.train.to_pylist():
        i = int(row["text"].removeprefix("text "))
        assert row["number pace"] == i // 6 + 1
        assert row["client"] == ("both" if i % 2 else f"c{i // 6}")
