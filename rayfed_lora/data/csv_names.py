"""Names in CSV columns: numbers, booleans or words. Source: this project."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data.naming import DECIMAL, NO_CLASSES, WHOLE, is_text
from rayfed_lora.errors import DataError

_WHOLE_OR_POINT_ZERO = re.compile(rf"(?:{WHOLE.pattern})(?:\.0*)?")
_NUMBER = re.compile(rf"{DECIMAL.pattern}(?:[eE][+-]?[0-9]+)?|[+-]?(?i:inf|infinity|nan)")
_MOST_DIGITS = 18  # every number of so many digits fits int64


def csv_names(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the texts of a CSV column of names, or the whole numbers they stand for.

    The result is numeric where every text is a whole number in its usual form (`7`, `7.0`, ` 7`)
    and no two texts are the same number; one `07` makes all of them texts.

    Args:
        column: texts; nulls are allowed.
    """
    texts = _distinct(column)
    stripped = [text.strip() for text in texts]
    wholes = [text.partition(".")[0] for text in stripped]
    if (
        all(map(_WHOLE_OR_POINT_ZERO.fullmatch, stripped))
        and len(set(wholes)) == len(texts)
        and all(len(whole) <= _MOST_DIGITS for whole in wholes)
    ):
        places = pc.index_in(column, value_set=pa.array(texts, column.type))
        return pc.take(pa.array([int(whole) for whole in wholes], pa.int64()), places)
    return column


def csv_labels(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return a CSV column of labels as `csv_names` does; booleans become `false` and `true`.

    Labels are booleans where every text is `false` or `true`, in any case.

    Args:
        column: texts; nulls are allowed.
        where: source and column, for messages.

    Raises:
        DataError: all texts are numbers, and some are fractions or not finite.
    """
    names = csv_names(column)
    if not is_text(names.type):
        return names
    texts = _distinct(column)
    stripped = [text.strip() for text in texts]
    if {text.lower() for text in stripped} <= {"false", "true"}:
        return pc.utf8_lower(pc.utf8_trim_whitespace(names))
    if all(map(_NUMBER.fullmatch, stripped)):
        odd = next((t for t in stripped if not float(t).is_integer()), None)
        if odd is not None:
            row = pc.index(column, texts[stripped.index(odd)]).as_py()
            raise DataError(
                f"{where}: need whole numbers or text, got {odd} in row {row + 1}{NO_CLASSES}"
            )
    return names


def _distinct(column: pa.ChunkedArray) -> list[str]:
    texts: list[str] = column.drop_null().unique().to_pylist()
    return texts
