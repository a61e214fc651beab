"""Errors about damaged files of a run folder, and what the user can do. Source: this project."""

from __future__ import annotations

from contextlib import suppress

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.storage import RunFolder

# Written again by a resumed run; any other file has to be restored from a copy.
_REWRITTEN = ("partition.parquet", "summary.json", "SHA256SUMS", "adapter/", "base/")


def is_rewritten(folder: RunFolder, name: str) -> bool:
    """Return whether a resumed run writes a file of the run folder again."""
    return name.startswith(_REWRITTEN) and bool(folder.names("checkpoints"))


def damaged(folder: RunFolder, name: str, reason: str) -> RunFolderError:
    """Return an error that names a damaged or missing file, the reason, and what to do."""
    advice = "restore it from a copy, or run anew in another folder"
    # Where a confined folder is not readable, this advice is all that is known.
    with suppress(RunFolderError):
        if is_rewritten(folder, name):
            advice = "a run with --resume writes it again from the last checkpoint"
        elif name.endswith(".parquet") and _has_no_checkpoint(folder):
            advice = "a run with --resume begins anew: it has no checkpoint yet"
    return RunFolderError(f"{child(folder.location, name)} is damaged: {reason}; {advice}")


def _has_no_checkpoint(folder: RunFolder) -> bool:
    """Return whether a folder holds a run that ended before its first checkpoint."""
    later = ("checkpoints", "summary.json", "SHA256SUMS")
    return folder.exists("recipe.yaml") and not any(folder.exists(name) for name in later)
