"""SHA256SUMS: the files of a finished run and their checksums, in the format of `sha256sum -c`.

The file covers the recipe, the tables, the exported model and summary.json. It does not cover the
checkpoints, which have manifests of their own, nor report.html, which `rayfed-lora report` writes
anew. It is written just before summary.json, and its first line is a checksum of the other lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from rayfed_lora.errors import RunFolderError
from rayfed_lora.runs import seals
from rayfed_lora.runs.seals import damaged
from rayfed_lora.storage import RunFolder

SUMS_FILE = "SHA256SUMS"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
# Key of summary.json that names the list; summaries of older versions lack the key.
# Of run folders that this version writes; older ones, without it, are read too.
FORMAT_KEY, FORMAT = "format", 1
CHECKSUMS_KEY = "checksums"
_SECTIONS = ("final", "best", "communication", "timing")
_OPTIONAL_SECTIONS = ("kept", "early_stopping")
_ENTRY = re.compile(r"([0-9a-f]{64})  (.+)")


def sha256(content: bytes) -> str:
    """Return the checksum of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def table_sha256(folder: RunFolder, name: str) -> str:
    """Return the checksum of a whole table; a RunFolderError where its seal does not match."""
    with seals.open_table(folder, name) as file:
        return seals.file_sha256(file)


def write(folder: RunFolder, sums: Mapping[str, str]) -> None:
    """Write the list: the checksum of each file by relative name."""
    lines = "".join(f"{digits}  {name}\n" for name, digits in sorted(sums.items()))
    folder.write(SUMS_FILE, seals.sealed_text(lines))


def withdraw(folder: RunFolder) -> None:
    """Remove summary and list: the run is not finished until both are written again.

    In this order: a summary without the list that it names is damage, a list without its summary is
    a run that has not finished.
    """
    for name in (SUMMARY_FILE, SUMS_FILE):
        folder.remove(name)


def listed(folder: RunFolder) -> dict[str, str] | None:
    """Return the checksums by name, None without a list; raises RunFolderError: it is damaged."""
    if not folder.exists(SUMS_FILE):
        return None
    try:
        lines = seals.text(folder, SUMS_FILE).splitlines()
    except OSError as error:
        raise damaged(folder, SUMS_FILE, f"it cannot be read ({error})") from None
    entries = [_ENTRY.fullmatch(line) for line in lines]
    if not entries or None in entries:
        raise damaged(folder, SUMS_FILE, "expected lines of a checksum and a name")
    return {entry[2]: entry[1] for entry in entries if entry is not None}


def checked(folder: RunFolder, name: str, sums: Mapping[str, str]) -> bytes:
    """Return a file's content, unchecked where the list does not contain the file.

    Raises OSError where an unlisted file cannot be read, RunFolderError where a listed one is
    missing or damaged.
    """
    try:
        content = folder.read(name)
    except OSError as error:
        if name not in sums:
            raise
        raise damaged(folder, name, f"it is missing or cannot be read ({error})") from None
    if name in sums and sha256(content) != sums[name]:
        raise damaged(folder, name, f"its bytes do not match {SUMS_FILE}")
    return content


def read_summary(folder: RunFolder) -> dict[str, Any] | None:
    """Return the checked summary of a finished run; None where the run is not finished.

    Raises RunFolderError where the summary, or the list of checksums, is damaged or missing.
    """
    if not folder.exists(SUMMARY_FILE):
        return None
    sums = listed(folder)
    try:
        summary = json.loads(checked(folder, SUMMARY_FILE, sums or {}))
        if not isinstance(summary, dict):
            raise ValueError(f"expected an object, got {type(summary).__name__}")
        if summary.get(FORMAT_KEY, FORMAT) != FORMAT:
            raise RunFolderError(
                f"{folder.location}: expected a run folder of format {FORMAT}, got"
                f" {summary[FORMAT_KEY]!r}: another version of rayfed-lora wrote it; use that one"
            )
        expected = [*_SECTIONS, *(name for name in _OPTIONAL_SECTIONS if name in summary)]
        if wrong := [name for name in expected if not isinstance(summary.get(name), dict)]:
            raise ValueError(f"expected {', '.join(wrong)} with their values")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(folder, SUMMARY_FILE, f"it cannot be read: {error}") from None
    if sums is None and CHECKSUMS_KEY in summary:
        raise damaged(folder, SUMS_FILE, f"it is missing, {SUMMARY_FILE} names it")
    return summary


def faults(folder: RunFolder) -> dict[str, str]:
    """Return what is wrong with the files of a finished run, by name; reads every listed file.

    A run killed between the writes of list and summary lacks its summary. An unfinished run, or one
    of an older version, has no faults here.
    """
    try:
        sums = listed(folder)
        if sums is None:
            read_summary(folder)
    except RunFolderError as error:
        return {SUMS_FILE: str(error)}
    found = {name: seals.check(folder, name, digits) for name, digits in (sums or {}).items()}
    return {name: fault for name, fault in found.items() if fault is not None}
