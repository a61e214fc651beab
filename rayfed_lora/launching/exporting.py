"""Export of a finished run: its adapter, or one merged model. Source: this project."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from rayfed_lora.errors import BadInputError, RunFolderError
from rayfed_lora.locations import check_name, child
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.checked import CheckedFolder
from rayfed_lora.runs.checksums import SUMMARY_FILE, listed, read_summary
from rayfed_lora.runs.claiming import kept_recipe
from rayfed_lora.storage import RunFolder

# Copied in pieces: a base may not fit into memory.
_CHUNK = 1 << 22


def export_run(location: str, to: Path, *, merge: bool) -> Iterator[str]:
    """Write a run's adapter (and its base if training changed it), or one merged model.

    Yields:
        A line for each part written.

    Raises:
        BadInputError: the folder holds no finished run, `to` has files or cannot be written, or
            the run has no adapter and `merge` is false.
    """
    run = RunFolder(location).confined()
    recipe = _finished_recipe(run)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise BadInputError(f"--to: expected a new or empty folder, {to} exists and is not one")
    if listed(run) is None:
        yield f"note: an older version wrote {location}, without checksums: nothing was checked"
    if merge:
        _write_merged(run, recipe, to)
        yield f"merged model: {to}"
        return
    with _contents(run) as contents:
        if "adapter" not in contents:
            raise BadInputError(
                f"{location}: this run has no adapter, it trained the full model or no module has"
                " factors; export it with --merge"
            )
        for part, files in contents.items():
            _write(files, to / part)
            yield f"{part}: {to / part}"


def _finished_recipe(run: RunFolder) -> Recipe:
    if not CheckedFolder(run).exists(SUMMARY_FILE) or read_summary(run) is None:
        wanted = f"the folder of a finished run ({SUMMARY_FILE})"
        raise RunFolderError(f"{run.location}: expected {wanted}")
    recipe = kept_recipe(run)
    if recipe is None:
        raise RunFolderError(f"{run.location}: expected a run's folder, it has no recipe.yaml")
    return recipe


@contextmanager
def _contents(run: RunFolder) -> Iterator[dict[str, dict[str, IO[bytes]]]]:
    """Open the files of the exported model by sub-folder and name, and check all of them."""
    checked, found = CheckedFolder(run), dict[str, dict[str, IO[bytes]]]()
    with ExitStack() as files:
        for part in ("adapter", "base"):
            for name in checked.names(part):
                try:
                    check_name(name)  # a stranger may have written the folder
                    content = files.enter_context(checked.open(f"{part}/{name}"))
                except (OSError, ValueError) as error:
                    where = child(run.location, part)
                    raise RunFolderError(f"{where} cannot be read: {error}") from None
                found.setdefault(part, {})[name] = content
        yield found


def _write(contents: Mapping[str, IO[bytes]], to: Path) -> None:
    with _writing(to):
        to.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with (to / name).open("wb") as file:
                shutil.copyfileobj(content, file, _CHUNK)


@contextmanager
def _writing(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInputError(f"--to: {to} cannot be written: {error}") from error


def _write_merged(run: RunFolder, recipe: Recipe, to: Path) -> None:
    from rayfed_lora.models import base_models, export

    with TemporaryDirectory() as scratch:
        with _contents(run) as contents:
            for part, files in contents.items():
                _write(files, Path(scratch) / part)
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        source = str(base) if base.exists() else base_models.location(recipe.model.source)
        labels = (read_summary(run) or {}).get("labels")
        if not isinstance(labels, list):
            where = child(run.location, SUMMARY_FILE)
            raise RunFolderError(f"{where}: expected a list of labels, got {labels!r}")
        net = export.merge(source, adapter if adapter.exists() else None, recipe.model, labels)
        tokenizer = recipe.model.tokenizer or recipe.model.source
        is_text = recipe.model.task != "image-classification"
        with _writing(to):
            export.write_model(to, net, base_models.location(tokenizer) if is_text else None)
