"""Values of a column as names of classes and of clients.

A name is spelled as in the file: `07` and `7` are two names, and so are `NA` and an empty cell.
Columns of whole numbers stay numeric, so that they sort by value.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from unicodedata import is_normalized, normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data.place import Place
from rayfed_lora.errors import DataError

# float64 is not exact for larger whole numbers: two of them may have been read as one.
_MOST_EXACT = 2**53
_WHOLE = re.compile(r"(?!-0)-?(?:0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_WHOLE_OR_POINT_ZERO = re.compile(rf"(?:{_WHOLE.pattern})(?:\.0*)?")
_NUMBER = re.compile(rf"{_DECIMAL.pattern}(?:[eE][+-]?[0-9]+)?|[+-]?(?i:inf|infinity|nan)")
_MOST_DIGITS = 18  # every number of so many digits fits int64
# Advice for labels that are fractions.
NO_CLASSES = (
    ": labels look like regression targets, and only classes can be trained; write each class as a"
    " word or a whole number"
)


def in_order(names: Iterable[str]) -> list[str]:
    """Return names sorted: by value where all of them are whole numbers, else as texts.

    >>> in_order(["10", "9", "-1"]), in_order(["10", "9", "09"])
    (['-1', '9', '10'], ['09', '10', '9'])
    """
    found = list(names)
    return sorted(found, key=int if all(map(_WHOLE.fullmatch, found)) else None)


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column decoded from its dictionary, which may hide nulls."""
    kind = column.type
    return pc.cast(column, kind.value_type) if pa.types.is_dictionary(kind) else column


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's types of text."""
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def is_number(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's integers or floats."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def as_names(column: pa.ChunkedArray, where: Place, advice: str = "") -> pa.ChunkedArray:
    """Return integers as they are, whole floats and decimals as int64, other values as texts.

    Booleans become `false` and `true`, dates and times ISO texts. The column has neither nulls nor
    a dictionary; `advice` ends the message on fractions.

    Raises:
        DataError: fractions, or values of a type that cannot be names.
    """
    kind = column.type
    if pa.types.is_integer(kind):
        return column
    if is_text(kind) or pa.types.is_boolean(kind):
        return pc.cast(column, pa.string())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _whole(column, where, advice)
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        try:
            texts = pc.cast(column, pa.string())
        except pa.ArrowException as error:
            raise DataError(f"{where}: need dates that can be written out, got {error}") from error
        return pc.replace_substring_regex(texts, r"\.0+(Z?)$", r"\1")
    raise DataError(f"{where}: need whole numbers or text, got {kind}")


def _whole(column: pa.ChunkedArray, where: Place, advice: str) -> pa.ChunkedArray:
    values = pc.cast(column, pa.float64(), safe=False).to_numpy()
    missing = np.flatnonzero(np.isnan(values))
    if len(missing) > 0:
        raise DataError(
            f"{where}: need a value in every row, got nan in {where.row(int(missing[0]))}"
            f" (the first row is 1; {len(missing)} in all)"
        )
    odd = np.flatnonzero((np.floor(values) != values) | ~np.isfinite(values))
    if len(odd) > 0:
        raise DataError(
            f"{where}: need whole numbers or text, got {column.type} and"
            f" {values[odd[0]]:g} in {where.row(int(odd[0]))}{advice}"
        )
    large = np.flatnonzero(np.abs(values) > _MOST_EXACT)
    if len(large) > 0:
        raise DataError(
            f"{where}: need whole numbers up to 2^53 where they are {column.type}, got"
            f" {values[large[0]]:.17g} in {where.row(int(large[0]))}, which may stand for"
            " several; write them as text"
        )
    return pa.chunked_array([pa.array(values.astype(np.int64))])


def csv_names(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the texts of a CSV column of names, or the whole numbers they stand for.

    The result is numeric where every text is a whole number in its usual form (`7`, `7.0`, ` 7`)
    and no two texts are the same number; one `07` makes all of them texts. Nulls stay.
    """
    texts = _distinct(column)
    stripped = [text.strip() for text in texts]
    wholes = [text.partition(".")[0] for text in stripped]
    usual = all(map(_WHOLE_OR_POINT_ZERO.fullmatch, stripped))
    if not usual or len(set(wholes)) < len(texts) or any(len(w) > _MOST_DIGITS for w in wholes):
        return column
    places = pc.index_in(column, value_set=pa.array(texts, column.type))
    return pc.take(pa.array([int(whole) for whole in wholes], pa.int64()), places)


def csv_labels(column: pa.ChunkedArray, where: Place) -> pa.ChunkedArray:
    """Return a CSV column of labels as `csv_names` does; booleans become `false` and `true`.

    Labels are booleans where every text is `false` or `true`, in any case. Nulls stay.

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
                f"{where}: need whole numbers or text, got {odd} in {where.row(row)}{NO_CLASSES}"
            )
    return names


def _distinct(column: pa.ChunkedArray) -> list[str]:
    texts: list[str] = column.drop_null().unique().to_pylist()
    return texts


def alike(names: Iterable[str], what: str) -> str | None:
    """Return a note on names that differ only in spelling, None without any."""
    groups: dict[str | Decimal, list[str]] = defaultdict(list)
    for name in names:
        groups[_folded(name)].append(name)
    similar = [group for group in groups.values() if len(group) > 1]
    if not similar:
        return None
    more = f" and {len(similar) - 3} more" if len(similar) > 3 else ""
    shown = ", ".join(" / ".join(map(_quoted, group)) for group in similar[:3])
    return (
        f"{what} that differ only in case, in surrounding spaces, or in how a number or a character"
        f" is written stay apart: {shown}{more}"
    )


def _folded(name: str) -> str | Decimal:
    """Return one value for all spellings that a reader takes for the same name."""
    # Case folding may leave text that composes further, and the reverse.
    text = normalize("NFKC", normalize("NFKC", name).casefold()).strip()
    # Decimal is exact for any number of digits.
    return Decimal(text) if _DECIMAL.fullmatch(text) else text


def _quoted(name: str) -> str:
    """Return a name in quotes; composed characters beyond ASCII as escapes."""
    return repr(name) if is_normalized("NFC", name) else ascii(name)
