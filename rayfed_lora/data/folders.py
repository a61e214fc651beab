"""The files that a path or URI stands for: one file, a pattern, or a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal

from pyarrow import fs

from rayfed_lora import storage
from rayfed_lora.data.raw_tables import READERS, is_table, naming_failures, suffixes_of
from rayfed_lora.errors import DataError
from rayfed_lora.locations import child, is_uri, pattern_start

# The one split of files whose names say no other.
ALL = "all"
# Names of splits, as the package `datasets` knows them.
SPLITS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "test": frozenset({"test", "testing", "eval", "evaluation"}),
    "validation": frozenset({"validation", "valid", "val", "dev"}),
}
IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
Kind = Literal["tables", "saved", "saved splits", "images"]
_INDEXES: Mapping[str, Kind] = {"dataset_dict.json": "saved splits", "state.json": "saved"}
_FORMATS = {
    ".jsonl": ".json",
    ".ndjson": ".json",
    ".feather": ".arrow",
    ".tsv": ".csv",
}
_SHOWN = 3


@dataclass(frozen=True)
class Located:
    """What a location stands for.

    Attributes:
        kind: tables; saved, saved splits: a folder of `datasets.save_to_disk`; images: a folder of
            classes.
        splits: the locations of the files by split, in the order in which they are read.
        labels: for images, the name of each file's class folder, by split.
        notes: messages for the user on files that are not read.
    """

    kind: Kind
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def locate(location: str, option: str) -> Located:
    """Return the files that a path, URI or pattern stands for; `option` is the recipe's key.

    Raises:
        DataError: there is no such file, or a folder has files that could be read in several ways.
    """
    local = location if is_uri(location) else os.path.expanduser(location)
    expected = f"a readable {suffixes_of(location)[0]} file" if is_table(location) else "a folder"
    what = f"{option} {location!r}"
    with naming_failures(what, expected):
        filesystem, path = storage.open_filesystem(local)
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            names = _names(filesystem, path, recursive=True)
            return _in_folder(local, names, what)
        if kind == fs.FileType.NotFound and _is_pattern(local):
            return Located("tables", {ALL: _matches(local, what)})
    return Located("tables", {ALL: [local]})


def is_folder_or_pattern(location: str) -> bool:
    """Return whether a path or URI without the suffix of a table may stand for files."""
    return is_uri(location) or _is_pattern(location) or os.path.isdir(os.path.expanduser(location))


def _is_pattern(location: str) -> bool:
    return pattern_start(location) is not None


def _names(filesystem: fs.FileSystem, path: str, *, recursive: bool) -> list[str]:
    """Return the sorted names of the files in a folder, without hidden ones."""
    selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    infos = filesystem.get_file_info(selector)
    start = len(path.rstrip("/")) + 1
    names = (info.path[start:] for info in infos if info.type == fs.FileType.File)
    return sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))


def _matches(location: str, what: str) -> list[str]:
    folder, parts = pattern_start(location) or (location, [])
    if "**" in parts:
        raise DataError(f"{what}: need '*' for each level of folders, got '**'")
    filesystem, path = storage.open_filesystem(folder)
    found = []
    for name in _names(filesystem, path, recursive=len(parts) > 1):
        levels = name.split("/")
        if len(levels) == len(parts) and all(map(fnmatchcase, levels, parts)):
            found.append(name)
    if not found:
        raise DataError(f"{what}: need a pattern of files that are there, none matches it")
    other = [name for name in found if not is_table(name)]
    if other:
        raise DataError(f"{what}: need a pattern that only tables match, got {_some(other)} too")
    _check_formats(found, what)
    return [child(folder, *name.split("/")) for name in found]


def _in_folder(location: str, names: Sequence[str], what: str) -> Located:
    for index, kind in _INDEXES.items():
        if index in names:
            return Located(kind, {ALL: [location]})
    tables = [n for n in names if is_table(n) and not n.startswith("_") and "/_" not in n]
    pictures = [n for n in names if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES]
    if tables and pictures:
        raise DataError(
            f"{what}: need a folder of tables or of images, got images and {_some(tables)}; for a"
            f" table of image paths set data.source to {child(location, *tables[0].split('/'))} and"
            " data.image_column to its column"
        )
    found = tables or pictures
    if not found:
        raise DataError(
            f"{what}: need a folder with tables ({' '.join(READERS)}), images in a"
            f" subfolder for each class, or what datasets.save_to_disk writes; got"
            f" {_some(names) or 'no files'}"
        )
    if tables:
        _check_formats(tables, what)
    splits = _image_splits(pictures, what) if pictures else _table_splits(tables, what)
    others = [n for n in names if n not in set(found)]
    notes = [f"{what}: not read, since they are no tables or images: {_some(others)}"] * bool(
        others
    )
    validation = splits.pop("validation", None)
    if validation:
        notes.append(
            f"{what}: files of a validation split are not read: {_some(validation)}; to test on"
            " them, name them in data.test_source"
        )
    depth = 0 if ALL in splits else 1
    labels = {key: [n.split("/")[depth] for n in splits[key]] for key in splits if pictures}
    return Located(
        "images" if pictures else "tables",
        {key: [child(location, *n.split("/")) for n in group] for key, group in splits.items()},
        labels,
        tuple(notes),
    )


def _check_formats(names: Sequence[str], what: str) -> None:
    """Reject files of several formats, of which some may not be meant."""
    formats: dict[str, str] = {}
    for name in names:
        suffix = suffixes_of(name)[0]
        formats.setdefault(_FORMATS.get(suffix, suffix), name)
    if len(formats) > 1:
        raise DataError(
            f"{what}: need files of one format, got {_some(sorted(formats.values()))}; name them"
            " with a pattern such as FOLDER/*.csv, or as a list"
        )


def _table_splits(names: Sequence[str], what: str) -> dict[str, list[str]]:
    """Return the files of each split, by words in their names; `ALL` where no name has one."""
    splits: dict[str, list[str]] = {}
    for name in names:
        words = set(re.split(r"[-._ 0-9/]+", name.lower()))
        kinds = [split for split, known in SPLITS.items() if known & words]
        if len(kinds) > 1:
            raise DataError(f"{what}: {name} could be of the splits {' and '.join(kinds)}")
        splits.setdefault(kinds[0] if kinds else ALL, []).append(name)
    if ALL in splits and len(splits) > 1:
        named = next(group[0] for split, group in splits.items() if split != ALL)
        raise DataError(
            f"{what}: {named} is of a split by its name and {splits[ALL][0]} is of none; name the"
            " files in data.source and data.test_source, as lists or as patterns such as"
            " FOLDER/train-*.csv"
        )
    folders = sorted({os.path.dirname(name) for name in splits.get(ALL, [])})
    if len(folders) > 1:
        raise DataError(
            f"{what}: need tables in one folder, got some in {_some([f or '.' for f in folders])};"
            " the names of the folders would be lost; name the tables with a pattern such as"
            " FOLDER/*/*.parquet"
        )
    return splits


def _image_splits(names: Sequence[str], what: str) -> dict[str, list[str]]:
    """Return the images of each split, by the name of the uppermost folder."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise DataError(
            f"{what}: need images in a subfolder for each class, got {_some(loose)} outside of them"
        )
    known = {word: split for split, words in SPLITS.items() for word in words}
    tops = sorted({name.split("/")[0] for name in names})
    of_splits = [top for top in tops if top.lower() in known]
    if not of_splits:
        return {ALL: [*names]}
    if len(of_splits) < len(tops):
        other = next(top for top in tops if top not in of_splits)
        raise DataError(
            f"{what}: subfolder {of_splits[0]} is a split by its name and {other} is none; need"
            " subfolders of classes, or of splits with subfolders of classes"
        )
    splits: dict[str, list[str]] = {}
    for name in names:
        if name.count("/") < 2:
            raise DataError(f"{what}: need {name} in a subfolder for its class")
        splits.setdefault(known[name.split("/")[0].lower()], []).append(name)
    return splits


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
