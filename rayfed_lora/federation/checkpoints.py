"""Checkpoints: safetensors and JSON, checksummed, complete only once their manifest is there.

`checkpoints/round-000012/` holds the run after 12 rounds: `state.safetensors`, `state.json` and,
written last, `manifest.json` with their SHA-256. A replaced base is kept beside them, once.

Source: this project.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rayfed_lora.errors import RunFolderError
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import AdapterState, Base, Factors

_FOLDER = "checkpoints"
_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on exactly.

    Attributes:
        rounds: number of finished rounds.
        state: global state.
        base: frozen base.
        held: (clients,) base version each client holds.
        facts: JSON values: schedule feedback, ledger totals, times.
    """

    rounds: int
    state: AdapterState
    base: Base
    held: npt.NDArray[np.int64]
    facts: Mapping[str, Any]


def write(folder: RunFolder, snapshot: Snapshot, keep: int) -> None:
    """Write a checkpoint, then remove all but the `keep` newest.

    Raises:
        RunError: the folder cannot be written; older checkpoints are untouched.
    """
    name = f"{_FOLDER}/round-{snapshot.rounds:06d}"
    tensors, scales = _flat(snapshot)
    contents = {
        "state.safetensors": save(tensors),
        "state.json": _json({**snapshot.facts, **_own_facts(snapshot, scales)}),
    }
    base_file = _write_base(folder, snapshot.base)
    for file, content in contents.items():
        folder.write(f"{name}/{file}", content)
    manifest = {
        "format": _FORMAT,
        "base": base_file,
        "files": {file: _sha256(content) for file, content in contents.items()},
    }
    folder.write(f"{name}/manifest.json", _json(manifest))
    _remove_old(folder, keep)


def newest(folder: RunFolder, warn: Callable[[str], None]) -> Snapshot | None:
    """Return the newest checkpoint that is whole, or None where there is none.

    A half-written or damaged one is passed over with a warning. Nothing is removed.

    Args:
        folder: the run folder.
        warn: called with one line for each checkpoint passed over.

    Raises:
        RunFolderError: there are checkpoints, but every one of them is damaged.
    """
    names = _names(folder)
    for name in reversed(names):
        try:
            return _read(folder, f"{_FOLDER}/{name}")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warn(f"checkpoint {name} is damaged or half written ({error}); using the one before it")
    if any(folder.exists(f"{_FOLDER}/{name}/manifest.json") for name in names):
        raise RunFolderError(f"every checkpoint in {folder.location}/{_FOLDER} is damaged")
    return None


def _names(folder: RunFolder) -> list[str]:
    return [name for name in folder.names(_FOLDER) if name.startswith("round-")]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_base(folder: RunFolder, base: Base) -> dict[str, str] | None:
    """Write a replaced base once; return its name and checksum."""
    if base.tensors is None:
        return None
    name = f"{_FOLDER}/base-{base.root:06d}"
    if not folder.exists(f"{name}.json"):
        content = save({n: np.ascontiguousarray(t) for n, t in base.tensors.items()})
        folder.write(f"{name}.safetensors", content)
        folder.write(f"{name}.json", _json({"sha256": _sha256(content)}))
    sha256 = json.loads(folder.read(f"{name}.json"))["sha256"]
    return {"name": f"{name}.safetensors", "sha256": sha256}


def _remove_old(folder: RunFolder, keep: int) -> None:
    names = _names(folder)
    for name in names[:-keep]:
        folder.remove(f"{_FOLDER}/{name}")
    used = set()
    for name in names[-keep:]:
        file = f"{_FOLDER}/{name}/manifest.json"
        base = json.loads(folder.read(file))["base"] if folder.exists(file) else None
        used.add("" if base is None else base["name"].rsplit("/", 1)[-1].split(".")[0])
    for name in folder.names(_FOLDER):
        if name.startswith("base-") and name.split(".")[0] not in used:
            folder.remove(f"{_FOLDER}/{name}")


def _flat(snapshot: Snapshot) -> tuple[dict[str, npt.NDArray[Any]], dict[str, float]]:
    """Return all tensors by a flat name, and the scales, which safetensors cannot hold."""
    tensors: dict[str, npt.NDArray[Any]] = {"held": snapshot.held}
    scales: dict[str, float] = {}
    groups = {"factors": snapshot.state.factors}
    groups |= {f"fold{i:04d}": fold for i, fold in enumerate(snapshot.base.folds)}
    for group, factors in groups.items():
        for name, f in factors.items():
            tensors[f"{group}|{name}|a"] = np.ascontiguousarray(f.a)
            tensors[f"{group}|{name}|b"] = np.ascontiguousarray(f.b)
            scales[f"{group}|{name}"] = f.scale
    for name, tensor in snapshot.state.dense.items():
        tensors[f"dense|{name}"] = np.ascontiguousarray(tensor)
    return tensors, scales


def _own_facts(snapshot: Snapshot, scales: Mapping[str, float]) -> dict[str, Any]:
    return {
        "rounds": snapshot.rounds,
        "base_root": snapshot.base.root,
        "scales": dict(scales),
        "dense_order": list(snapshot.state.dense),
    }


def _checked(folder: RunFolder, name: str, sha256: str) -> bytes:
    content = folder.read(name)
    if _sha256(content) != sha256:
        raise ValueError(f"{name} does not match its checksum")
    return content


def _read(folder: RunFolder, name: str) -> Snapshot:
    manifest = json.loads(folder.read(f"{name}/manifest.json"))
    if manifest["format"] != _FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {_FORMAT}")
    contents = {f: _checked(folder, f"{name}/{f}", s) for f, s in manifest["files"].items()}
    facts = json.loads(contents["state.json"])
    tensors = load(contents["state.safetensors"])
    groups: dict[str, dict[str, Factors]] = {}
    # Orders come from the JSON: safetensors sorts its names.
    for key, scale in facts["scales"].items():
        group, module = key.split("|")
        factors = Factors(tensors[f"{key}|a"], tensors[f"{key}|b"], scale)
        groups.setdefault(group, {})[module] = factors
    dense = {name: tensors[f"dense|{name}"] for name in facts["dense_order"]}
    folds = tuple(groups[group] for group in sorted(groups) if group != "factors")
    saved = None
    if manifest["base"] is not None:
        saved = load(_checked(folder, manifest["base"]["name"], manifest["base"]["sha256"]))
    base = Base(int(facts["base_root"]), saved, folds)
    state = AdapterState(groups.get("factors", {}), dense)
    return Snapshot(int(facts["rounds"]), state, base, tensors["held"], facts)
