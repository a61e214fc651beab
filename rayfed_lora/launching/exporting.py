"""Export of a finished run: its adapter, or one merged model. Source: this project."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from rayfed_lora.errors import BadInputError, ModelError, RunFolderError
from rayfed_lora.locations import check_name, child
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.checked import CheckedFolder
from rayfed_lora.runs.checksums import SUMMARY_FILE, listed, read_summary
from rayfed_lora.runs.claiming import kept_recipe
from rayfed_lora.runs.model_card import (
    ADAPTER_FILES,
    BASE_KEY,
    CARD_FILE,
    describe_adapter,
    describe_model,
)
from rayfed_lora.storage import RunFolder

# Copied in pieces: a base may not fit into memory.
_CHUNK = 1 << 22


def export_run(location: str, to: Path, *, merge: bool) -> Iterator[str]:
    """Write a run's adapter (and its base if training changed it), or one merged model.

    The adapter's files are written into `to` itself, its base into `to/base`.

    Yields:
        A line for each part written.

    Raises:
        BadInputError: the folder holds no finished run, `to` has files, is inside of the run
            folder or cannot be written, or the run has no adapter and `merge` is false.
    """
    run = RunFolder(location).confined()
    recipe, summary = _finished(run)
    _check_target(run, to)
    if listed(run) is None:
        yield f"note: an older version wrote {location}, without checksums: nothing was checked"
    write = _write_merged if merge else _write_adapter
    yield from write(run, recipe, summary, to)


def _check_target(run: RunFolder, to: Path) -> None:
    with _writing(to):
        used = to.exists() and (not to.is_dir() or any(to.iterdir()))
        # Not `Path.resolve`, which raises RuntimeError for a link to itself.
        place = Path(os.path.realpath(to))
        inside = run.local is not None and place.is_relative_to(os.path.realpath(run.local))
    if used:
        raise BadInputError(f"--to: expected a new or empty folder, {to} exists and is not one")
    if inside:
        raise BadInputError(f"--to: expected a folder outside of the run folder, got {to}")


def _finished(run: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    summary = read_summary(run) if CheckedFolder(run).exists(SUMMARY_FILE) else None
    if summary is None:
        wanted = f"the folder of a finished run ({SUMMARY_FILE})"
        raise RunFolderError(f"{run.location}: expected {wanted}")
    recipe = kept_recipe(run, model_only=True)
    if recipe is None:
        raise RunFolderError(f"{run.location}: expected a run's folder, it has no recipe.yaml")
    return recipe, summary


def _write_adapter(
    run: RunFolder, recipe: Recipe, summary: dict[str, Any], to: Path
) -> Iterator[str]:
    with _contents(run) as contents:
        adapter, base = contents.get("adapter"), contents.get("base")
        if adapter is None:
            raise BadInputError(
                f"{run.location}: this run has no adapter, it trained the full model or no module"
                " has factors; export it with --merge"
            )
        _check_whole(run, adapter)
        # Absolute: readers find the base from any working directory.
        place = to.absolute()
        own_base = None if base is None else place / "base"
        config = adapter[ADAPTER_FILES[0]].read()
        try:
            made = describe_adapter(config, place, own_base, [*adapter], recipe, summary)
        except ValueError as error:
            where = child(run.location, "adapter", ADAPTER_FILES[0])
            raise RunFolderError(f"{where} cannot be read: {error}") from None
        _write(adapter | {name: BytesIO(content) for name, content in made.items()}, to)
        named = Path(json.loads(made[ADAPTER_FILES[0]])[BASE_KEY])
        if own_base is None and named.is_absolute() and not named.is_dir():
            yield f"note: its base is not on this machine, expected the folder {named}"
        yield f"adapter: {to}"
        if base is not None:
            _write(base, to / "base")
            yield f"base: {to / 'base'}"


def _check_whole(run: RunFolder, names: Collection[str]) -> None:
    """Raise RunFolderError where a file of the adapter is missing."""
    absent = [name for name in ADAPTER_FILES if name not in names]
    if absent:
        where = child(run.location, "adapter")
        raise RunFolderError(f"{where}: expected {' and '.join(absent)}; restore it from a copy")


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


def _write_merged(
    run: RunFolder, recipe: Recipe, summary: dict[str, Any], to: Path
) -> Iterator[str]:
    from rayfed_lora.models import base_models, base_weights, export

    labels = summary.get("labels")
    if not isinstance(labels, list):
        where = child(run.location, SUMMARY_FILE)
        raise RunFolderError(f"{where}: expected a list of labels, got {labels!r}")
    with TemporaryDirectory() as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        with _contents(run) as contents:
            if not contents:
                raise RunFolderError(f"{run.location}: expected adapter/ or base/, it has neither")
            if "adapter" in contents:
                _check_whole(run, contents["adapter"])
            for part, files in contents.items():
                _write(files, Path(scratch) / part)
        with _writing(to):  # tried before the model is computed
            to.mkdir(parents=True, exist_ok=True)
        model, beside = recipe.model, _with_processor(adapter, base)
        if beside is not None:
            # The run's own copy: the source may have moved since.
            model = model.model_copy(update={"tokenizer": str(beside)})
        source = str(base) if base.exists() else base_models.location(model.source)
        net = export.merge(source, adapter if adapter.exists() else None, model, labels)
        dtype = None
        try:
            dtype = base_weights.source_dtype(recipe.model)
        except ModelError as error:
            yield f"note: written as float32, the precision of the source is unknown: {error}"
        with _writing(to):
            export.write_model(to, net, model, dtype, beside)
            names = [path.name for path in to.iterdir()]
            (to / CARD_FILE).write_bytes(describe_model(to.absolute(), names, recipe, summary))
    yield f"merged model: {to}"


def _with_processor(*folders: Path) -> Path | None:
    """Return the first folder that has a tokenizer or an image processor."""
    wanted = ("tokenizer_config.json", "preprocessor_config.json")
    return next((f for f in folders if any((f / name).is_file() for name in wanted)), None)
