"""The raw tables of a recipe's sources, of every kind."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import PurePosixPath

import pyarrow as pa

from rayfed_lora.data import columns, folders, hub, image_files, memory, raw_tables, turns
from rayfed_lora.data.folders import Located
from rayfed_lora.data.hub import TEST_OPTION, Wanted
from rayfed_lora.data.place import Place
from rayfed_lora.data.raw_tables import RawData
from rayfed_lora.errors import DataError
from rayfed_lora.plugins.tables import DATA
from rayfed_lora.recipe.data import Data

# Name and number of rows of each file.
Files = tuple[tuple[str, int], ...]
# How to make a readable table of other kinds of files.
_ADVICE = {
    ".txt": "rename a table with tabs to .tsv; give lines of text a first line `text`, as .csv",
    ".xlsx": "export the sheet as CSV",
    ".xls": "export the sheet as CSV",
    ".ods": "export the sheet as CSV",
    ".zip": "unpack it, and name the file or folder",
    ".tar": "unpack it, and name the file or folder",
    ".tgz": "unpack it, and name the file or folder",
    ".xz": "unpack it, or pack it as .gz",
    ".7z": "unpack it, and name the file or folder",
    ".pkl": "pandas.read_pickle(...).to_parquet('rows.parquet')",
    ".pickle": "pandas.read_pickle(...).to_parquet('rows.parquet')",
    ".orc": "pandas.read_orc(...).to_parquet('rows.parquet')",
    ".h5": "pandas.read_hdf(...).to_parquet('rows.parquet')",
    ".npz": "write a Parquet file with a column of images as nested lists",
    ".npy": "write a Parquet file with a column of images as nested lists",
}


def read(data: Data, task: str, numbers: Sequence[str] = (), seed: int = 0) -> RawData:
    """Read `data.source` and, if set, `data.test_source`, whose rows are the test rows.

    Paths in image columns are replaced by the images' bytes. `numbers` are further columns
    that the recipe names, `seed` is that of the run.

    Raises:
        DataError: a source cannot be found or read, or the two share a file.
    """
    raw = _read(data.source, "data.source", data, task, numbers, seed)
    if data.test_source is None:
        return raw
    other = _read(data.test_source, TEST_OPTION, data, task, (), seed)
    where = place(TEST_OPTION, data.test_source, ())
    test, typed, files = other.train, other.typed, other.files
    if other.test is not None:
        test, typed, files = other.test, other.test_typed, other.test_files
    if other.class_names is not None and other.class_names != raw.class_names:
        raise DataError(
            f"{where}: need the classes of data.source"
            f" ({', '.join(raw.class_names or ['without names'])}), got"
            f" {', '.join(other.class_names)}"
        )
    trained_on = {os.path.realpath(name) for name, _ in raw.files}
    both = next((name for name, _ in files if os.path.realpath(name) in trained_on), None)
    if both is not None:
        raise DataError(f"{where}: need rows that are not trained on, got {both} of data.source")
    notes = [*raw.notes, *other.notes]
    if raw.test is not None:
        notes.append(
            f"{place('data.source', data.source, ())}: its test split gives way to {TEST_OPTION}"
        )
    return replace(raw, test=test, test_typed=typed, test_files=files, notes=tuple(notes))


def place(option: str, source: str | Sequence[str], files: Files) -> Place:
    """Return the place of a source: its key and location, and its files where there are several."""
    shown = repr(source)
    if not isinstance(source, str) and len(source) > 1:
        shown = f"{source[0]!r} and {len(source) - 1} more"
    return Place(f"{option} {shown}", files if len(files) > 1 else ())


def _read(
    source: str | Sequence[str],
    option: str,
    data: Data,
    task: str,
    numbers: Sequence[str],
    seed: int,
) -> RawData:
    wanted = Wanted(
        option,
        columns.candidates(data, "label_column"),
        columns.candidates(data, "image_column") if task == columns.IMAGE_TASK else (),
    )
    if isinstance(source, str):
        if source in DATA:
            # Options beside `source` are those of the method that it names.
            values = data.options if option == "data.source" else {}
            chosen = DATA.with_options(source, values)
            chosen.check_task(task, option)
            return _as_files(source, chosen.read(seed, wanted.labels))
        if source.startswith(memory.MEMORY_PREFIX):
            return memory.read_memory(source, wanted.labels)
        if source.startswith(hub.HUB_PREFIX):
            return hub.read_hub(source, wanted)
    located = []
    for location in [source] if isinstance(source, str) else source:
        _check_form(location, option)
        located.append(folders.locate(location, option))
    if len(located) > 1 and any(each.kind != "tables" for each in located):
        raise DataError(f"{option}: need tables in a list, got {located[0].kind}; name one folder")
    first = located[0]
    if first.kind in ("saved", "saved splits"):
        return hub.read_saved(first.splits[folders.ALL][0], first.kind == "saved splits", wanted)
    notes = tuple(note for each in located for note in each.notes)
    main = "test" if option == TEST_OPTION else "train"
    # Files whose names say no split are what the key asks for.
    groups = [_group(located, (folders.ALL, main))]
    if main == "train" and any("test" in each.splits for each in located):
        groups.append(_group(located, ("test",)))
    if not groups[0]:
        got = sorted({split for each in located for split in each.splits})
        raise DataError(
            f"{place(option, source, ())}: need files of a split `{main}`, got {', '.join(got)}"
        )
    read_group = _images if first.kind == "images" else partial(_tables, task=task)
    (train, files), *tests = (read_group(group, data, wanted, numbers) for group in groups)
    test, test_files = tests[0] if tests else (None, ())
    typed, test_typed = (raw_tables.is_typed(group[0][0]) for group in (groups[0], groups[-1]))
    return RawData(train, test, None, typed, test_typed, files, test_files, notes)


def _as_files(source: str, raw: RawData) -> RawData:
    if raw.test is None:
        return replace(raw, files=((source, raw.train.num_rows),))
    return replace(raw, test_files=((f"{source}, test split", raw.test.num_rows),))


def _check_form(location: str, option: str) -> None:
    """Reject a location that can be no table, pattern or folder."""
    if location and (raw_tables.is_table(location) or folders.is_folder_or_pattern(location)):
        return
    near = difflib.get_close_matches(location, DATA, n=1)
    advice = _ADVICE.get(PurePosixPath(location).suffix.lower())
    if re.fullmatch(r"[\w.]+:\w+", location):
        advice = "an own method of a module needs --plugins MODULE, or run(plugins=[MODULE])"
    raise DataError(
        f"{option} {location!r}: need a name ({', '.join(DATA)}), a path or URI"
        f" ending in {' '.join(raw_tables.READERS)} (or {' '.join(raw_tables.COMPRESSIONS)} after"
        " it), a pattern such as FOLDER/*.csv, a folder that is there, or hf:<id>"
        + (f" (did you mean {near[0]!r}?)" if near else "")
        + (f"; {advice}" if advice else "")
    )


def _group(located: Sequence[Located], splits: Sequence[str]) -> list[tuple[str, str]]:
    """Return the files of some splits in order, each with its label, or "" without labels."""
    return [
        pair
        for each in located
        for split in splits
        for pair in zip(
            each.splits.get(split, ()), each.labels.get(split) or repeat(""), strict=False
        )
    ]


def _images(
    group: Sequence[tuple[str, str]], data: Data, wanted: Wanted, numbers: Sequence[str]
) -> tuple[pa.Table, Files]:
    files, labels = zip(*group, strict=True)
    return image_files.read_images(files, labels, wanted.option), tuple((f, 1) for f in files)


def _tables(
    group: Sequence[tuple[str, str]],
    data: Data,
    wanted: Wanted,
    numbers: Sequence[str],
    *,
    task: str,
) -> tuple[pa.Table, Files]:
    """Return the rows of all files in one table, and the number of each file's rows."""
    client = () if data.partition.column is None else (data.partition.column,)
    labels = (*wanted.labels, *client)
    turned = turns.column_names(data) if task == columns.LANGUAGE_TASK else ()
    texts = (*columns.candidates(data, "text_column"), *labels, *wanted.images, *turned)
    files = [file for file, _ in group]
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise DataError(f"{wanted.option}: need every file once, got {twice} twice")
    tables = []
    for file in files:
        table = raw_tables.read_file(file, texts, wanted.option, data.format).train
        tables.append(image_files.with_contents(table, wanted.images, file, wanted.option))
    named = frozenset((*texts, *numbers))
    return _joined(files, tables, named, wanted.option), tuple(
        (file, table.num_rows) for file, table in zip(files, tables, strict=True)
    )


def _joined(
    files: Sequence[str], tables: Sequence[pa.Table], named: frozenset[str], option: str
) -> pa.Table:
    """Return the rows of all tables, with the columns that all have.

    Columns `named` by the recipe are in every table, and of types that go together.
    """
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for file, table in zip(files, tables, strict=True):
        mine, its = (named & {*t.column_names} for t in (first, table))
        if mine != its:
            raise DataError(
                f"{option}: need the same columns in all files, got {', '.join(sorted(mine ^ its))}"
                f" only in {files[0] if mine - its else file}, and not in"
                f" {file if mine - its else files[0]}"
            )
    shared = [n for n in first.column_names if all(t.column_names.count(n) == 1 for t in tables)]
    kept = [name for name in shared if name in named or _go_together(tables, name)]
    for name in kept:
        if not _go_together(tables, name):
            kinds = dict.fromkeys(f"{t.schema.field(name).type}" for t in tables)
            odd = next(i for i, t in enumerate(tables) if not _go_together([first, t], name))
            raise DataError(
                f"{option} {files[odd]!r}, column {name!r}: need the type that it has in"
                f" {files[0]}, got {' and '.join(kinds)}"
            )
    return pa.concat_tables([t.select(kept) for t in tables], promote_options="permissive")


def _go_together(tables: Sequence[pa.Table], name: str) -> bool:
    try:
        pa.unify_schemas(
            [pa.schema([t.schema.field(name).with_nullable(True)]) for t in tables],
            promote_options="permissive",
        )
    except pa.ArrowException:
        return False
    return True
