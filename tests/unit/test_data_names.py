"""Labels and client names of every kind and file: what the file says, or an error that helps."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from rayfed_lora.data import naming, text_files
from rayfed_lora.data.columns import MOST_CHARACTERS
from rayfed_lora.data.dataset import load
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data, Partition

TASK = "text-classification"
DAY = datetime.date(2024, 1, 31)


def csv_of(cells: list[str], folder: Path, column: str = "label") -> str:
    """Write each cell as it stands into a CSV file with a second column of two classes."""
    path = folder / "rows.csv"
    other = "kind" if column == "label" else "label"
    rows = [f"text {i},{cell},{i % 2}\n" for i, cell in enumerate(cells)]
    path.write_text(f"text,{column},{other}\n{''.join(rows)}")
    return str(path)


def parquet_of(values: pa.Array, folder: Path, **others: Any) -> str:
    path = folder / "rows.parquet"
    texts = [f"text {i}" for i in range(len(values))]
    parquet.write_table(pa.table({"text": texts, "label": values, **others}), path)
    return str(path)


def jsonl_of(values: list[Any], folder: Path) -> str:
    path = folder / "rows.jsonl"
    rows = [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def names_by_text(source: str, **options: Any) -> dict[str, str]:
    """Return the name of each row's class."""
    found = load(Data(source=source, **options), TASK, 0, 0.0)
    rows = [*found.train.to_pylist(), *found.test.to_pylist()]
    return {row["text"]: found.label_names[row["label"]] for row in rows}


CSV = {
    # what usual files hold: numbers in numeric order
    "whole numbers": (["10", "9", "0"], ("0", "9", "10")),
    "negative numbers": (["-1", "1", "10"], ("-1", "1", "10")),
    "numbers as pandas writes them with gaps": (["10.0", "9.0"], ("9", "10")),
    "numbers behind a space": ([" 10", " 9"], ("9", "10")),
    # what is not a usual number stays what it is
    "leading zeros": (["07", "7", "10"], ("07", "10", "7")),
    "all with leading zeros": (["02", "10", "01"], ("01", "02", "10")),
    "a sign": (["+5", "5"], ("+5", "5")),
    "two spellings of a number": (["1", "1.0"], ("1", "1.0")),
    "a space before one of them": (["7", " 7"], (" 7", "7")),
    "exponents": (["1e3", "2e3"], ("1e3", "2e3")),
    "minus zero": (["-0", "0"], ("-0", "0")),
    "beyond int64": ([str(2**64), str(2**64 + 1)], (str(2**64), str(2**64 + 1))),
    "booleans": (["true", "false"], ("false", "true")),
    "Python's booleans": (["True", "False"], ("false", "true")),
    "booleans in any case": (["TRUE", "False", "true"], ("false", "true")),
    "booleans and another word": (["True", "False", "maybe"], ("False", "True", "maybe")),
    "dates": (["2024-01-31", "2023-12-31"], ("2023-12-31", "2024-01-31")),
    "times": (["12:30", "12:31:00"], ("12:30", "12:31:00")),
    "words for nothing": (["NA", "null", "None", "nan"], ("NA", "None", "nan", "null")),
    "numbers and words": (["1", "one", "10"], ("1", "10", "one")),
    "cases": (["Yes", "yes", "no"], ("Yes", "no", "yes")),
    "a quoted empty text": (['""', "x"], ("", "x")),
    "quoted digits": (['"07"', '"7"'], ("07", "7")),
}


@pytest.mark.parametrize("kind", CSV)
def test_labels_of_a_csv_file_are_named_as_the_file_names_them(kind, tmp_path):
    cells, names = CSV[kind]
    source = csv_of(cells * 6, tmp_path)
    assert load(Data(source=source), TASK, 0, 0.0).label_names == names
    found = names_by_text(source)
    for i, cell in enumerate(cells * 6):
        spelt = cell.strip('"')
        assert found[f"text {i}"] in {spelt, spelt.strip().removesuffix(".0"), spelt.lower()}


STAMPS = [datetime.datetime(2024, 1, 31, 8, 30), datetime.datetime(2023, 1, 1)]
TYPED = {
    "whole floats": (pa.array([10.0, 9.0]), ("9", "10")),
    "half floats": (pa.array([1.0, 0.0], pa.float32()), ("0", "1")),
    "minus zero": (pa.array([-0.0, 1.0]), ("0", "1")),
    "decimals": (pa.array([Decimal("1.00"), Decimal("0.00")]), ("0", "1")),
    "booleans": (pa.array([True, False]), ("false", "true")),
    "dates": (pa.array([DAY, datetime.date(2023, 12, 31)]), ("2023-12-31", "2024-01-31")),
    "timestamps": (pa.array(STAMPS), ("2023-01-01 00:00:00", "2024-01-31 08:30:00")),
    "timestamps of a zone": (
        pa.array(STAMPS, pa.timestamp("ms", "UTC")),
        ("2023-01-01 00:00:00Z", "2024-01-31 08:30:00Z"),
    ),
    "times": (pa.array([datetime.time(12, 30), datetime.time(1)]), ("01:00:00", "12:30:00")),
    "texts of digits, in the order of texts": (pa.array(["10", "9", "07"]), ("07", "10", "9")),
    "categories": (pa.array(["b", "a"]).dictionary_encode(), ("a", "b")),
    "categories of whole floats": (pa.array([1.0, 0.0]).dictionary_encode(), ("0", "1")),
    "views": (pa.array(["b", "a"], pa.string_view()), ("a", "b")),
    "unsigned": (pa.array([10, 9], pa.uint8()), ("9", "10")),
}


@pytest.mark.parametrize("kind", TYPED)
def test_labels_of_every_type_of_a_typed_file_are_classes(kind, tmp_path):
    values, names = TYPED[kind]
    source = parquet_of(pa.concat_arrays([values] * 6), tmp_path)
    assert load(Data(source=source), TASK, 0, 0.0).label_names == names


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        (["07", "7"], ("07", "7")),
        (["2024-01-31", "2023-12-31"], ("2023-12-31", "2024-01-31")),
        (["null", "NA"], ("NA", "null")),
    ],
)
def test_labels_of_json_lines_are_what_they_are_there(values, names, tmp_path):
    assert load(Data(source=jsonl_of(values * 6, tmp_path)), TASK, 0, 0.0).label_names == names


def test_a_null_behind_a_category_is_a_missing_value(tmp_path):
    hidden = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2] * 4), pa.array(["a", None, "b"]))
    path = tmp_path / "rows.feather"
    feather.write_feather(pa.table({"text": [str(i) for i in range(12)], "label": hidden}), path)
    with pytest.raises(DataError, match=r"null in row 2 .*4 nulls in all"):
        load(Data(source=str(path)), TASK, 0, 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([0.5, 1.0] * 4), "got double and 0.5 in row 1: labels look like regression"),
        (pa.array([1.0, float("nan")] * 4), "got nan in row 2 .*4 in all"),
        (pa.array([1.0, float("inf")] * 4), "got double and inf in row 2"),
        (pa.array([1.0, None] * 4), "null in row 2 .*4 nulls in all"),
        (pa.array([None] * 8, pa.null()), "null in row 1 .*8 nulls in all"),
        (pa.array([2.0**53 + 2, 1.0] * 4), "up to 2.53 .* 9007199254740994 in row 1"),
        (pa.array([[1], [2]] * 4), "need whole numbers or text, got list"),
        (pa.array([b"a", b"b"] * 4), "need whole numbers or text, got binary"),
        (pa.array([Decimal("0.5"), Decimal("1.0")] * 4), "look like regression"),
        (pa.array([datetime.timedelta(1)] * 8), "need whole numbers or text, got duration"),
    ],
    ids=str,
)
def test_labels_that_name_no_class_are_an_error_that_says_what_to_write(values, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load(Data(source=parquet_of(values, tmp_path)), TASK, 0, 0.0)


def test_numbers_of_a_csv_column_that_is_not_the_label_stay_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,target\n" + "a,x,0.5\nb,y,1.5\n" * 6)
    found = load(Data(source=str(path)), TASK, 0, 0.0, ("target",))
    assert found.label_names == ("x", "y")
    assert set(found.train["number target"].to_pylist()) == {0.5, 1.5}


@pytest.mark.parametrize("column", ["label", "who"])
def test_a_csv_column_of_names_that_says_what_devices_are_like_stays_one_of_names(column, tmp_path):
    path = tmp_path / "rows.csv"
    other = "label" if column == "who" else "who"
    path.write_text(f"text,{column},{other}\n" + "a,007,x\nb,7,y\nc,10,x\n" * 6)
    data = Data(source=str(path), partition=Partition(kind="column", column="who"))
    found = load(data, TASK, 0, 0.0, (column,))
    names = found.label_names if column == "label" else found.clients
    assert names == ("007", "10", "7")
    assert set(found.train[f"number {column}"].to_pylist()) == {7.0, 10.0}
    path.write_text(f"text,{column},{other}\n" + "a,slow,x\nb,7,y\n" * 6)
    with pytest.raises(DataError, match=f"column '{column}': need numbers, got .*slow"):
        load(data, TASK, 0, 0.0, (column,))


def test_fractions_do_not_matter_where_no_labels_are_asked_for(tmp_path):
    source = csv_of(["0.5", "1.5"] * 6, tmp_path)
    data = Data(source=source, partition=Partition(kind="iid"))
    assert load(data, "causal-lm", 0, 0.0).label_names == ("text",)


def test_a_byte_order_mark_and_dots_belong_to_no_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbflabel,text,user.id\n" + b"07,a,1\n7,b,2\n" * 6)
    data = Data(source=str(path), partition=Partition(kind="column", column="user.id"))
    found = load(data, TASK, 0, 0.0)
    assert (found.label_names, found.clients) == (("07", "7"), ("1", "2"))


def test_labels_and_clients_that_differ_in_case_or_spaces_only_are_told(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,who\n" + "a,Yes,mia\nb,yes,mia \nc,no,bob\n" * 4)
    data = Data(source=str(path), partition=Partition(kind="column", column="who"))
    assert load(data, TASK, 0, 0.0).notes == (
        f"labels that differ only {HOW} stay apart: 'Yes' / 'yes'",
        f"clients of column 'who' that differ only {HOW} stay apart: 'mia' / 'mia '",
    )


HOW = "in case, in surrounding spaces, or in how a number or a character is written"


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        (["1", "1.0", "2"], "'1' / '1.0'"),
        (["7", "07", "8"], "'7' / '07'"),
        (["+5", "5.00", "x"], "'+5' / '5.00'"),
        (["-0", "0", "1"], "'-0' / '0'"),
        (["caf\u00e9", "cafe\u0301", "tea"], r"'café' / 'cafe\u0301'"),
        (["\uff11", "1", "2"], "'\uff11' / '1'"),
        (["\u2460", "1", "2"], "'\u2460' / '1'"),
        ([str(2**64), f"0{2**64}", str(2**64 + 1)], f"'{2**64}' / '0{2**64}'"),
    ],
)
def test_spellings_of_one_number_or_text_stay_apart_with_a_note(cells, shown, tmp_path):
    found = load(Data(source=csv_of(cells * 6, tmp_path)), TASK, 0, 0.0)
    assert len(found.label_names) == 3
    (note,) = found.notes
    said, _, group = note.partition(": ")
    assert said == f"labels that differ only {HOW} stay apart"
    assert set(group.split(" / ")) == set(shown.split(" / "))


@pytest.mark.parametrize("cells", [["0.0", "inf"], ["1", "-Infinity"], ["0", "1", "nan"]])
def test_numbers_that_are_not_finite_are_no_labels_of_a_csv_file_either(cells, tmp_path):
    match = rf"need whole numbers or text, got {cells[-1]} in row {len(cells)}"
    with pytest.raises(DataError, match=match):
        load(Data(source=csv_of(cells * 6, tmp_path)), TASK, 0, 0.0)


@pytest.mark.parametrize("cells", [["True", "False"], ["true", "false"]])
def test_booleans_to_keep_may_be_written_as_such(cells, tmp_path):
    data = Data(source=csv_of([*cells, "maybe"] * 6, tmp_path), labels=cells)
    assert load(data, TASK, 0, 0.0).label_names == tuple(cells)
    typed = parquet_of(pa.array([True, False] * 6), tmp_path)
    for labels in ([True, False], ["true", "false"]):
        assert load(Data(source=typed, labels=labels), TASK, 0, 0.0).label_names == (
            "true",
            "false",
        )
    assert Data(labels=[True, 1, "x"]).labels == ["true", 1, "x"]


def test_usual_names_are_worth_no_note(tmp_path):
    source = csv_of(["yes", "no"] * 6, tmp_path)
    assert load(Data(source=source), TASK, 0, 0.0).notes == ()


CLIENTS = {
    "whole numbers": (["0", "1", "10", "11", "2"], ("0", "1", "2", "10", "11")),
    "leading zeros": (["007", "7", "10"], ("007", "10", "7")),
    "words": (["b", "a", "10", "9"], ("10", "9", "a", "b")),
    "whole numbers as pandas writes them with gaps": (["1.0", "2.0", "10.0"], ("1", "2", "10")),
    "fractions": (["1.5", "10.5"], ("1.5", "10.5")),
    "two spellings of a number": (["1", "1.0"], ("1", "1.0")),
    "booleans": (["true", "false"], ("false", "true")),
    "dates": (["2024-01-31", "2023-01-31"], ("2023-01-31", "2024-01-31")),
    "words for nothing": (["NA", "null", "None"], ("NA", "None", "null")),
    "beyond int64": ([str(2**70), "3"], ("3", str(2**70))),
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_clients_of_a_csv_file_are_named_as_the_file_names_them(kind, tmp_path):
    cells, names = CLIENTS[kind]
    source = csv_of(cells * 4, tmp_path, "who")
    data = Data(source=source, partition=Partition(kind="column", column="who"))
    assert load(data, TASK, 0, 0.0).clients == names


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (pa.array([10, 9, 2]), ("2", "9", "10")),
        (pa.array([10.0, 9.0, 2.0]), ("2", "9", "10")),
        (pa.array(["10", "9", "2"]), ("2", "9", "10")),
        (pa.array(["10", "9", "2"]).dictionary_encode(), ("2", "9", "10")),
        (pa.array(["10", "9", "x"]), ("10", "9", "x")),
        (pa.array([DAY] * 3), ("2024-01-31",)),
        (pa.array([2**64 - 1, 5, 5], pa.uint64()), ("5", str(2**64 - 1))),
    ],
    ids=str,
)
def test_clients_of_every_type_of_a_typed_file_have_their_names(values, names, tmp_path):
    kinds = pa.array([i % 2 for i in range(4 * len(values))])
    source = parquet_of(kinds, tmp_path, who=pa.concat_arrays([values] * 4))
    data = Data(source=source, partition=Partition(kind="column", column="who"))
    assert load(data, TASK, 0, 0.0).clients == names


def test_a_null_among_clients_is_an_error_with_its_row_and_number(tmp_path):
    source = csv_of(["mia", "", "bob", ""] * 2, tmp_path, "who")
    data = Data(source=source, partition=Partition(kind="column", column="who"))
    with pytest.raises(DataError, match=r"column 'who': .*null in row 2 .*4 nulls in all"):
        load(data, TASK, 0, 0.0)


LONG = "a" * (MOST_CHARACTERS + 1)


def written(suffix: str, texts: list[str], folder: Path) -> str:
    path = folder / f"rows{suffix}"
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_text_without_end_is_an_error_that_names_its_row(suffix, tmp_path):
    source = written(suffix, ["a", "b", LONG, LONG[1:]], tmp_path)
    with pytest.raises(DataError, match=r"at most 1,000,000 .*got 1,000,001 in row 3 \(1 such"):
        load(Data(source=source), TASK, 0, 0.0)


def test_characters_are_counted_and_not_bytes(tmp_path):
    texts = ["“" * MOST_CHARACTERS, *["a", "b", "c"] * 4]
    assert load(Data(source=written(".parquet", texts, tmp_path)), TASK, 0, 0.0).clients is None


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_row_larger_than_what_is_read_at_once_is_an_error_that_says_so(
    suffix, tmp_path, monkeypatch
):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 10_000)
    source = written(suffix, ["a", "b" * 30_000, "c"], tmp_path)
    with pytest.raises(DataError, match="got a row of more than 10,000 bytes"):
        load(Data(source=source), TASK, 0, 0.0)


def test_whole_numbers_sort_as_numbers_only_where_all_are_such():
    assert naming.in_order(["10", "9", "-3"]) == ["-3", "9", "10"]
    assert naming.in_order(["10", "9", "-03"]) == ["-03", "10", "9"]
    # digits of other scripts are no whole numbers here
    assert naming.in_order(["10", "9", "٣"]) == ["10", "9", "٣"]
