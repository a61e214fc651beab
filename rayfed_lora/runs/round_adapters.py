"""Adapters of chosen rounds, kept beside the run's last one. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayfed_lora.federation.run import Run
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checksums
from rayfed_lora.runs.model_card import ADAPTER_FILES, describe_adapter
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Engine
from rayfed_lora.tasks.messages import Export

_FOLDER = "adapters"


def is_due(recipe: Recipe, run: Run) -> bool:
    """Return whether the adapter after a round is to be kept; full-model rounds have none."""
    every = recipe.storage.adapters_every
    return every is not None and run.rounds % every == 0 and bool(run.model.state.factors)


def keep_adapter(
    folder: RunFolder, recipe: Recipe, engine: Engine, run: Run, facts: Mapping[str, Any]
) -> None:
    """Write the adapter after a round into adapters/round-000012, after 12 rounds.

    Its files lie in that folder itself, and its base in `base`, where the source does not provide
    it, as `export` writes them. `facts` are those of a summary that a model card needs.
    """
    files = engine.submit(Export(run.model)).result()
    parts: dict[str, dict[str, bytes]] = {"adapter": {}, "base": {}}
    for path, content in files.items():
        part, _, name = path.partition("/")
        parts[part][name] = content
    adapter, base = parts["adapter"], parts["base"]
    if not adapter:
        return
    place = f"{_FOLDER}/round-{run.rounds:06d}"
    root = (folder.local or Path()) / place
    config, own_base = adapter[ADAPTER_FILES[0]], root / "base" if base else None
    adapter |= describe_adapter(config, root, own_base, [*adapter], recipe, facts)
    for name, content in {**{f"base/{n}": c for n, c in base.items()}, **adapter}.items():
        folder.write(f"{place}/{name}", content)


def kept_sums(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """Yield name and SHA-256 of each file of the adapters that are kept."""
    for each in folder.names(_FOLDER):
        place = f"{_FOLDER}/{each}"
        names = [*folder.names(place), *(f"base/{name}" for name in folder.names(f"{place}/base"))]
        for name in names:
            if name != "base":
                yield f"{place}/{name}", checksums.sha256(folder.read(f"{place}/{name}"))
