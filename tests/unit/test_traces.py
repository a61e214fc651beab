"""Files that say when clients can be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed_lora.data.traces import read_trace
from rayfed_lora.errors import DataError


def write(folder: Path, text: str) -> str:
    path = folder / "times.csv"
    path.write_text(text)
    return str(path)


def test_a_trace_is_read_with_its_times(tmp_path):
    source = write(tmp_path, "client,start_s,end_s\n0,0,1.5\n2,3,4\n")
    trace = read_trace(source, 3, None)
    assert trace.client.tolist() == [0, 2]
    assert trace.start_s.tolist() == [0.0, 3.0]
    assert trace.end_s.tolist() == [1.5, 4.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("client,start_s\n0,0\n", "need one column each of client, start_s, end_s"),
        ("client,start_s,end_s\n", "need rows"),
        ("client,start_s,end_s\n0,0,1\n3,0,1\n", "0 to 2 as client, got client 3 .* in row 2"),
        ("client,start_s,end_s\n-1,0,1\n", "got client -1"),
        ("client,start_s,end_s\n0.5,0,1\n", "got client 0.5"),
        ("client,start_s,end_s\n0,2,1\n", "0 <= start_s < end_s, got client 0 from 2 to 1"),
        ("client,start_s,end_s\n0,-1,1\n", "0 <= start_s"),
        ("client,start_s,end_s\n0,0,11\n", "end_s up to period_s"),
        (
            "client,start_s,end_s\n0,0,\n1,0,1\n",
            "column 'end_s': need a value in every row, got null in row 1",
        ),
        ("client,start_s,end_s\nann,0,1\n", "column 'client': need numbers, got string"),
        ("", "a readable .csv file"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(text, expected, tmp_path):
    with pytest.raises(DataError, match=expected) as raised:
        read_trace(write(tmp_path, text), 3, 10.0)
    assert "clients.availability.trace" in str(raised.value)


def test_a_missing_file_and_a_strange_ending_are_said(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        read_trace(str(tmp_path / "none.csv"), 3, None)
    with pytest.raises(DataError, match="ending in"):
        read_trace(str(tmp_path / "times.txt"), 3, None)


def test_rows_of_a_client_that_touch_or_overlap_are_one(tmp_path):
    source = write(tmp_path, "client,start_s,end_s\n1,5,9\n0,50,100\n0,0,50\n1,0,6\n1,20,30\n")
    trace = read_trace(source, 3, None)
    assert trace.client.tolist() == [0, 1, 1]
    assert trace.start_s.tolist() == [0.0, 0.0, 20.0]
    assert trace.end_s.tolist() == [100.0, 9.0, 30.0]


def test_a_row_shorter_than_a_microsecond_is_none(tmp_path):
    with pytest.raises(DataError, match="0 <= start_s < end_s"):
        read_trace(write(tmp_path, "client,start_s,end_s\n0,1,1.0000001\n"), 3, None)
