"""CSV, TSV and JSON as people write them: the right values, or an error that names the line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayfed_lora.data.dataset import load
from rayfed_lora.errors import DataError, RecipeError
from rayfed_lora.recipe.data import Data
from tests.fakes import make_recipe

TASK = "text-classification"
# 10 rows of two classes, with characters outside of ASCII.
ROWS = [(f"café, {i}", ["nö", "ja"][i % 2]) for i in range(10)]


def lines(separator: str = ",", quote: str = '"', header: bool = True) -> str:
    rows = [f"{quote}{text}{quote}{separator}{label}\n" for text, label in ROWS]
    return f"text{separator}label\n" * header + "".join(rows)


JSON_LINES = "".join(
    json.dumps({"text": t, "label": n}, ensure_ascii=False) + "\n" for t, n in ROWS
)
ARRAY = json.dumps([{"text": t, "label": n} for t, n in ROWS], ensure_ascii=False, indent=1)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


READ: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "tsv": ("a.tsv", lines("\t", "").encode(), {}),
    "tsv in upper case": ("A.TSV", lines("\t", "").encode(), {}),
    "tsv with quotes": ("a.tsv", lines("\t").encode(), {}),
    "semicolons": ("a.csv", lines(";", "").encode(), {}),
    "semicolons and a quoted comma in the first line": (
        "a.csv",
        lines(";")
        .replace("text;label", '"text";"label";"a,b"')
        .replace("\n", ";\n")
        .replace('"a,b";', '"a,b"', 1)
        .encode(),
        {},
    ),
    "tabs in a csv": ("a.csv", lines("\t", "").encode(), {}),
    "bars": ("a.csv", lines("|", "").encode(), {}),
    "a separator of its own": ("a.csv", lines("^", "").encode(), {"separator": "^"}),
    "commas in a tsv": ("a.tsv", lines().encode(), {"separator": ","}),
    "tab by its name": ("a.csv", lines("\t", "").encode(), {"separator": "tab"}),
    "single quotes": ("a.csv", lines(quote="'").encode(), {"quote": "'"}),
    "latin-1": ("a.csv", lines().encode("latin-1"), {"encoding": "latin-1"}),
    "cp1252": ("a.tsv", lines("\t").encode("cp1252"), {"encoding": "cp1252"}),
    "mark of utf-8": ("a.csv", codecs.BOM_UTF8 + lines().encode(), {}),
    "mark of utf-8, encoding given": (
        "a.csv",
        codecs.BOM_UTF8 + lines().encode(),
        {"encoding": "utf-8"},
    ),
    "utf-16 with its mark": ("a.csv", lines(";").encode("utf-16"), {}),
    "utf-16 with its mark, encoding given": (
        "a.csv",
        lines().encode("utf-16"),
        {"encoding": "utf-16-le"},
    ),
    "utf-16 big-endian with its mark": (
        "a.csv",
        codecs.BOM_UTF16_BE + lines().encode("utf-16-be"),
        {},
    ),
    "utf-16 without a mark": ("a.csv", lines().encode("utf-16-le"), {"encoding": "utf-16-le"}),
    "utf-32": ("a.csv", lines().encode("utf-32"), {}),
    "lines that end as on Windows": ("a.csv", lines().replace("\n", "\r\n").encode(), {}),
    "no line end at the end": ("a.csv", lines().rstrip().encode(), {}),
    "no first line of names": (
        "a.csv",
        lines(header=False).encode(),
        {"columns": ["text", "label"]},
    ),
    "csv.gz": ("a.csv.gz", gzip.compress(lines().encode()), {}),
    "csv.gz of two members": (
        "a.csv.gz",
        gzip.compress(lines().encode()[:40]) + gzip.compress(lines().encode()[40:]),
        {},
    ),
    "tsv.bz2": ("a.tsv.bz2", bz2.compress(lines("\t", "").encode()), {}),
    "csv.zst": ("a.csv.zst", zstd(lines().encode()), {}),
    "latin-1 in gzip": (
        "a.csv.gz",
        gzip.compress(lines().encode("latin-1")),
        {"encoding": "latin-1"},
    ),
    "jsonl": ("a.jsonl", JSON_LINES.encode(), {}),
    "ndjson": ("a.ndjson", JSON_LINES.encode(), {}),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress(JSON_LINES.encode()), {}),
    "jsonl.zst": ("a.jsonl.zst", zstd(JSON_LINES.encode()), {}),
    "jsonl in utf-16": ("a.jsonl", JSON_LINES.encode("utf-16"), {}),
    "jsonl in latin-1": ("a.jsonl", JSON_LINES.encode("latin-1"), {"encoding": "latin-1"}),
    "jsonl with the mark of utf-8": ("a.jsonl", codecs.BOM_UTF8 + JSON_LINES.encode(), {}),
    "json": ("a.json", ARRAY.encode(), {}),
    "json with spaces in front": ("a.json", b"\n  " + ARRAY.encode(), {}),
    "json in utf-16": ("a.json", ARRAY.encode("utf-16"), {}),
    "json.gz": ("a.json.gz", gzip.compress(ARRAY.encode()), {}),
}


@pytest.mark.parametrize("kind", READ)
def test_text_files_of_every_kind_give_the_same_rows(kind: str, tmp_path: Path) -> None:
    name, content, form = READ[kind]
    (tmp_path / name).write_bytes(content)
    found = load(Data(source=str(tmp_path / name), format=form), TASK, 0, 0.0)
    rows = [*found.train.to_pylist(), *found.test.to_pylist()]
    assert sorted((row["text"], found.label_names[row["label"]]) for row in rows) == sorted(ROWS)


HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TWICE = "text,label\n" + "a,x\nb,y\n" * 3
ODD: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "latin-1": (
        "a.csv",
        lines().encode("latin-1"),
        {},
        r"byte 0xe9 in line 2, which is not utf-8; give data\.format\.encoding",
    ),
    "latin-1 in json lines": (
        "a.jsonl",
        (json.dumps({"text": "a", "label": "x"}) + "\n" + JSON_LINES).encode("latin-1"),
        {},
        "byte 0xe9 in line 2, which is not utf-8",
    ),
    "latin-1 late in json lines": (
        "a.jsonl",
        (json.dumps({"text": "a" * 99, "label": "x"}) + "\n" + JSON_LINES).encode("latin-1"),
        {},
        "byte 0xe9 in line 2, which is not utf-8",
    ),
    "latin-1 in a json array": ("a.json", ARRAY.encode("latin-1"), {}, "byte 0xe9 in line 3"),
    "utf-8 read as latin-1": (
        "a.csv",
        lines().encode(),
        {"encoding": "latin-1"},
        r"UTF-8 content with data\.format\.encoding latin-1",
    ),
    "a mark of another encoding": (
        "a.csv",
        lines().encode("utf-16"),
        {"encoding": "latin-1"},
        r"the byte order mark of utf-16 with data\.format\.encoding latin-1",
    ),
    "utf-16 without a mark": ("a.csv", TWICE.encode("utf-16-le"), {}, "NUL.*utf-16-le"),
    "a row too short": ("a.csv", b"text,label\na,x\nb\n", {}, "got 1 values in row 2 .* has 2"),
    "a row too long": ("a.csv", b"text,label\na,x\nb,c,y\n", {}, "got 3 values in row 2 .* has 2"),
    "a row too long without names": (
        "a.csv",
        b"a,x\nb,c,y\n",
        {"columns": ["text", "label"]},
        "got 3 values in row 2 .* has 2",
    ),
    "quotes inside quotes": (
        "a.csv",
        b'text,label\na,x\n"the "best" one",y\n',
        {},
        r"in line 3 that starts with a quote .*data\.format\.quote: null",
    ),
    "a quote that never ends": ("a.csv", b'text,label\na,x\n"b,y\nc,x\n', {}, "in line 3 that"),
    "backslashes before quotes": (
        "a.csv",
        b'text,label\n"a \\"b\\" c",x\n',
        {},
        "in line 2 that starts with a quote",
    ),
    "two possible separators": (
        "a.csv",
        b"text;a|b;label\n1;2;3\n",
        {},
        r"with ';' and '\|' and without ','; give data\.format\.separator",
    ),
    "a comma among semicolons": (
        "a.csv",
        b"text;label;in EUR, net\n1;2;3,4\n",
        {},
        r"got the columns text;label;in EUR,  net; .*set data\.format\.separator",
    ),
    "commas in a tsv": ("a.tsv", TWICE.encode(), {}, r"columns text,label;.*format\.separator"),
    "no first line of names": (
        "a.csv",
        TWICE.encode().removeprefix(b"text,label\n"),
        {},
        r"got the columns a, x;.*data\.format\.columns",
    ),
    "an empty text column": ("a.csv", b"text,label\n,x\n,y\n", {}, r"null in row 1 .*2 nulls"),
    "numbers as classes": (
        "a.csv",
        b"text,label\n" + b"".join(b"t,%d\n" % i for i in range(30)),
        {},
        r"labels that several rows share, .* 30 rows, .*data\.label_column",
    ),
    "an HTML page": ("a.csv", HTML, {}, "an HTML page in place of the file"),
    "a pointer of Git LFS": ("a.jsonl", POINTER, {}, "git lfs pull"),
    "an Excel workbook": ("a.csv", b"PK\x03\x04rest", {}, "an Excel workbook; .*CSV"),
    "gzip without its name": (
        "a.csv",
        gzip.compress(TWICE.encode()),
        {},
        r"let the name end in .gz",
    ),
    "gzip in name only": ("a.csv.gz", TWICE.encode(), {}, "a readable .csv file, got zlib"),
    "gzip cut off": ("a.csv.gz", gzip.compress(TWICE.encode())[:-9], {}, "got Truncated"),
    "Parquet as csv": ("a.csv", b"PAR1....PAR1", {}, "let the name end in .parquet"),
    "one object of columns": (
        "a.json",
        json.dumps({"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 2}}).encode(),
        {},
        r"one object with text, label; need an object for each row.*records",
    ),
    "one object around the rows": (
        "a.json",
        json.dumps({"data": [{"text": "a", "label": 1}]}).encode(),
        {},
        "one object with data",
    ),
    "an array of texts": ("a.json", b'[{"text": "a"}, "b"]', {}, "objects, in row 2"),
    "two kinds in one JSON column": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n',
        {},
        "label.* changed from number to string",
    ),
    "text": ("a.txt", TWICE.encode(), {}, r"rename a table with tabs to \.tsv"),
    "a workbook": ("a.xlsx", b"PK\x03\x04", {}, "export the sheet as CSV"),
    "a zip archive": ("a.csv.zip", b"PK\x03\x04", {}, "unpack it"),
    "a pickle": ("a.pkl", b"\x80", {}, "to_parquet"),
    "an array of numpy": ("a.npz", b"PK\x03\x04", {}, "Parquet file with a column of images"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_text_files_are_an_error_that_names_file_and_place(kind: str, tmp_path: Path) -> None:
    name, content, form, message = ODD[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        load(Data(source=str(tmp_path / name), format=form), TASK, 0, 0.0)
    assert name in str(refused.value)


def test_quotes_are_plain_characters_where_the_recipe_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"a" b\tx\n"c\ty\n' * 1 + 'd "e"\tx\nf\ty\n')
    data = Data(source=str(path), format={"quote": None}, test_fraction=0.5)
    found = load(data, TASK, 0, 0.0)
    texts = {row["text"] for row in (*found.train.to_pylist(), *found.test.to_pylist())}
    assert texts == {'"a" b', '"c', 'd "e"', "f"}


def test_keys_that_only_later_objects_of_an_array_have_are_columns(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "label": "x"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(
        DataError, match="column 'label': need a value in every row, got null in row 1"
    ):
        load(Data(source=str(tmp_path / "a.json")), TASK, 0, 0.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("separator", "ab", "data.format.separator"),
        ("separator", "", "data.format.separator"),
        ("separator", "§", "data.format.separator"),
        ("separator", "\n", "data.format.separator"),
        ("quote", "ab", "data.format.quote"),
        ("encoding", "utf-9", "data.format.encoding: .*an encoding that Python knows"),
        ("encoding", "hex", "data.format.encoding"),
        ("columns", "text", "data.format.columns"),
    ],
)
def test_options_of_text_files_are_checked_with_the_recipe(key, value, message) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(data__format={key: value})
