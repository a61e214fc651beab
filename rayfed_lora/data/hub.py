"""Data sets of the Hugging Face hub, and folders of `datasets.save_to_disk`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from rayfed_lora.data import raw_tables
from rayfed_lora.data.image_files import with_contents
from rayfed_lora.data.raw_tables import RawData
from rayfed_lora.errors import DataError
from rayfed_lora.locations import child

HUB_PREFIX = "hf:"
TEST_OPTION = "data.test_source"
_CONFIGURATIONS = re.compile(r"available configs: (\[.*?\])")


@dataclass(frozen=True)
class Wanted:
    """What to read: the recipe's key, and the columns that it may name, in order."""

    option: str
    labels: Sequence[str]
    images: Sequence[str]


@dataclass(frozen=True)
class _Split:
    """A split: what reads it, and the names of classes by column."""

    read: Callable[[], pa.Table]
    class_names: Mapping[str, Sequence[str]]


def read_hub(source: str, wanted: Wanted) -> RawData:
    """Read `hf:ID`, `hf:ID:CONFIGURATION` or `hf:ID:CONFIGURATION:SPLIT`; parts may be empty.

    Without SPLIT, that is the split `train`, with the split `test` where there is one; for
    `data.test_source` it is `test`. The id is that of a public or cached data set. Labels get the
    names of the data set's own ClassLabel feature. A test split whose labels are all -1, the hub's
    mark for hidden ones, counts as absent.

    Raises:
        DataError: `datasets` is not installed or cannot load the id, or there is no such split.
    """
    where = f"{wanted.option} {source!r}"
    name, *rest = source.removeprefix(HUB_PREFIX).split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{where}: need hf:ID, hf:ID:CONFIGURATION or hf:ID:CONFIGURATION:SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{where}: need the package `datasets`, which is not installed;"
            " pip install 'rayfed-lora[hub]'"
        ) from error
    try:
        loaded = datasets.load_dataset(name, *[part for part in rest[:1] if part])
    except Exception as error:  # the hub's client has no common error
        found = _CONFIGURATIONS.search(" ".join(str(error).split()))
        if found:
            raise DataError(
                f"{where}: need one of the configurations {found[1]}, as in hf:{name}:CONFIGURATION"
            ) from error
        raise DataError(
            f"{where}: need a data set that `datasets` can load, got {type(error).__name__}:"
            f" {raw_tables.first_line(error)}"
        ) from error
    splits = {
        key: _Split(
            partial(_arrow_table, split),
            {c: f.names for c, f in split.features.items() if getattr(f, "names", None)},
        )
        for key, split in loaded.items()
    }
    chosen = rest[1] if len(rest) == 2 else None
    advice = f"hf:{name}:{rest[0] if rest else ''}:SPLIT"
    return _joined(splits, chosen, wanted, source, advice)


def read_saved(folder: str, is_dict: bool, wanted: Wanted) -> RawData:
    """Read what `DatasetDict.save_to_disk` or `Dataset.save_to_disk` wrote, on any filesystem.

    The splits of a DatasetDict are used as `read_hub` says.

    Raises:
        DataError: the folder lacks a file or a split, or has a file of another format.
    """
    what = f"{wanted.option} {folder!r}"
    with raw_tables.naming_failures(what, "a folder as datasets.save_to_disk writes it"):
        if not is_dict:
            splits = {"": _saved_split(folder, wanted)}
            return _joined(splits, "", wanted, folder, "")
        names = _json(child(folder, "dataset_dict.json"), wanted.option, "splits", list)
        splits = {str(n): _saved_split(child(folder, str(n)), wanted) for n in names}
        return _joined(splits, None, wanted, folder, child(folder, "SPLIT"))


def _saved_split(folder: str, wanted: Wanted) -> _Split:
    features = _json(child(folder, "dataset_info.json"), wanted.option, "features", dict)
    names = {
        column: kind["names"]
        for column, kind in features.items()
        if isinstance(kind, dict) and isinstance(kind.get("names"), list)
    }
    files = _json(child(folder, "state.json"), wanted.option, "_data_files", list)
    return _Split(partial(_saved_table, folder, files, wanted), names)


def _saved_table(folder: str, files: Sequence[Any], wanted: Wanted) -> pa.Table:
    if not files or not all(isinstance(f, dict) and "filename" in f for f in files):
        raise ValueError("a state.json without names of data files")
    places = [child(folder, str(file["filename"])) for file in files]
    return pa.concat_tables(
        with_contents(
            raw_tables.read_file(place, (), wanted.option).train,
            wanted.images,
            place,
            wanted.option,
        )
        for place in places
    )


def _json(location: str, option: str, key: str, kind: type) -> Any:
    with raw_tables.opened(location, option, "a file of datasets.save_to_disk") as stream:
        content = json.loads(stream.read())
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise ValueError(f"one without {key!r}")
        return content[key]


def _arrow_table(split: Any) -> pa.Table:
    return split.with_format("arrow")[:]


def _joined(
    splits: Mapping[str, _Split], chosen: str | None, wanted: Wanted, source: str, advice: str
) -> RawData:
    """Return the chosen split, or the training split with the test split that may be there."""
    is_test = wanted.option == TEST_OPTION
    main = chosen if chosen is not None else "test" if is_test else "train"
    if main not in splits:
        raise DataError(
            f"{wanted.option} {source!r}: need a split `{main}`, got {', '.join(sorted(splits))};"
            f" name one as in {advice}"
        )
    train = _complete(splits[main], wanted)
    label = next((name for name in wanted.labels if name in train.column_names), "")
    names = splits[main].class_names.get(label)
    test, notes = None, []
    if chosen is None and not is_test and "test" in splits:
        test = _complete(splits["test"], wanted)
        if label in test.column_names and test[label].unique().to_pylist() == [-1]:
            test = None
            notes.append(f"{wanted.option} {source!r}: its test split, of labels -1, is not used")
    # The same split of a data set is the same source, whether it is named or not.
    where = source if chosen is not None else advice.replace("SPLIT", main)
    files = ((where, train.num_rows),)
    class_names = None if names is None else tuple(map(str, names))
    return RawData(train, test, class_names, files=files, notes=tuple(notes))


def _complete(split: _Split, wanted: Wanted) -> pa.Table:
    return with_contents(split.read(), wanted.images, None, wanted.option)
