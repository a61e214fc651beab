"""Folders as `datasets.save_to_disk` writes them, read without that package."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from rayfed_lora.errors import DataError
from tests.unit.test_data_sources import LABELS, all_of, numbers, part, read


def save_to_disk(folder: Path, tables: list[pa.Table], names: list[str]) -> None:
    """Write what `datasets` 5.2 writes, as far as it is read."""
    folder.mkdir(parents=True)
    files = [f"data-0000{i}-of-0000{len(tables)}.arrow" for i in range(len(tables))]
    for name, table in zip(files, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as w:
            w.write_table(table)
    state = {"_data_files": [{"filename": name} for name in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def numbered(first: int, rows: int = 6) -> pa.Table:
    table = part(first, rows)
    return table.set_column(1, "label", pa.array([i % 2 for i in range(first, first + rows)]))


def test_a_data_set_saved_to_disk_is_read_with_its_names_of_classes(tmp_path):
    save_to_disk(tmp_path / "saved", [numbered(0), numbered(6)], LABELS)
    for source in (str(tmp_path / "saved"), (tmp_path / "saved").as_uri()):
        found = read(source)
        assert found.label_names == ("ham", "spam")
        assert all_of(found) == list(range(12))


def test_splits_saved_to_disk_are_train_and_test(tmp_path):
    for name, first in (("train", 0), ("test", 6), ("extra", 12)):
        save_to_disk(tmp_path / "saved" / name, [numbered(first)], LABELS)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test", "extra"]}')
    found = read(str(tmp_path / "saved"))
    assert (numbers(found.train), numbers(found.test)) == (list(range(6)), list(range(6, 12)))
    other = read(str(tmp_path / "saved"), test_source=str(tmp_path / "saved" / "extra"))
    assert numbers(other.test) == list(range(12, 18))


def test_a_test_source_of_other_classes_is_an_error(tmp_path):
    save_to_disk(tmp_path / "train", [numbered(0)], LABELS)
    save_to_disk(tmp_path / "test", [numbered(6)], LABELS[::-1])
    with pytest.raises(DataError, match=r"the classes of data.source \(ham, spam\), got spam, ham"):
        read(str(tmp_path / "train"), test_source=str(tmp_path / "test"))
