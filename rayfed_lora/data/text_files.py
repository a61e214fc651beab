"""The bytes of text files, made UTF-8; content of another kind is named."""

from __future__ import annotations

import codecs

# The longest CSV or JSON record, such as an image written out in numbers.
BLOCK_BYTES = 1 << 26
AUTO = "auto"
# UTF-32 first: its mark starts with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What files with the name of a text file often are.
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or export it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; export it as CSV",
    b"\x1f\x8b": "gzip content; let the name end in .gz",
    b"BZh": "bzip2 content; let the name end in .bz2",
    b"\x28\xb5\x2f\xfd": "Zstandard content; let the name end in .zst",
    b"PAR1": "Parquet content; let the name end in .parquet",
    b"ARROW1": "Arrow content; let the name end in .arrow",
    b"%PDF": "a PDF document",
    b"<!doctype html": "an HTML page in place of the file; download the file itself",
    b"<html": "an HTML page in place of the file; download the file itself",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; run `git lfs pull`",
}


def reject_other_kinds(head: bytes) -> None:
    """Raise a ValueError that names what a file is, by its first bytes, if it is no text."""
    for start, kind in _OTHER_KINDS.items():
        if head[: len(start)].lower() == start.lower():
            raise ValueError(kind)


def as_utf8(content: bytes, encoding: str, first_line: int = 1) -> bytes:
    """Return the content of a text file as UTF-8 without a byte order mark.

    With encoding `auto` it is that of the byte order mark, otherwise UTF-8; `first_line` is the
    number of the content's first line in the file.

    Raises:
        ValueError: the content is of another kind or not in that encoding; names the line.
    """
    reject_other_kinds(content[:64])
    marked = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    used = encoding if encoding != AUTO else marked or "utf-8"
    if marked is not None and not codecs.lookup(used).name.startswith(marked):
        raise ValueError(
            f"the byte order mark of {marked} with data.format.encoding {encoding}; leave it auto"
        )
    try:
        text = content.decode(used)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + first_line
        raise ValueError(
            f"byte 0x{content[error.start]:02x} in line {line}, which is not {used}; give"
            " data.format.encoding, such as latin-1, cp1252 or shift_jis"
        ) from error
    _reject_other_encodings(content, text, used)
    if codecs.lookup(used).name == "utf-8":
        return content.removeprefix(codecs.BOM_UTF8)
    return text.removeprefix("\ufeff").encode("utf-8", "surrogatepass")


def _reject_other_encodings(content: bytes, text: str, used: str) -> None:
    """Reject content that decodes without an error, but to wrong characters."""
    if "\0" in text[:1000]:
        raise ValueError(
            "NUL characters, as UTF-16 without a byte order mark has them; give"
            " data.format.encoding, such as utf-16-le"
        )
    single_byte = codecs.lookup(used).name.startswith(("iso8859", "cp125"))
    if single_byte and not content.isascii():
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            return
        raise ValueError(f"UTF-8 content with data.format.encoding {used}; leave it auto")
