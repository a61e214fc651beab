"""Checkpoints: safetensors and JSON, checksummed, complete only once their manifest is there.

`checkpoints/round-000012/` holds the run after 12 rounds: `state.safetensors`, `state.json` and,
written last, `manifest.json` with their SHA-256. A replaced base is kept beside them, once; so is
the memory of clients, in pieces (`client_memory`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rayfed_lora.aggregation.server_step import Moments
from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.runs import checksums
from rayfed_lora.runs.client_memory import (
    MEMORY_PREFIX,
    MemoryWriter,
    named,
    numbered,
    read_memory,
)
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import AdapterState, Base, Factors, FloatArray, GlobalModel

_FOLDER = "checkpoints"
_FORMAT = 3
# What files that are not as they were written may lead to.
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    SafetensorError,
    RunFolderError,
)


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on exactly.

    Attributes:
        rounds: number of finished rounds.
        state: global state.
        base: frozen base.
        held: by kind, (clients,) what version of it each client holds.
        facts: JSON values: schedule feedback, ledger totals, times.
        moments: of the server's optimiser, by tensor.
        personal: B by module, of each client that keeps its own.
        history: (clients,) arrays of what samplers know of clients, by name; may be empty.
        memory: arrays of the objective, of each client that has taken part.
        shared: the server's arrays of the objective.
        kept: the best model so far; its replaced base, if any, is `base`'s.
    """

    rounds: int
    state: AdapterState
    base: Base
    held: Mapping[str, npt.NDArray[np.int64]]
    facts: Mapping[str, Any]
    moments: Moments = field(default_factory=dict)
    personal: Mapping[int, Mapping[str, FloatArray]] = field(default_factory=dict)
    history: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    memory: Mapping[int, Mapping[str, FloatArray]] = field(default_factory=dict)
    shared: Mapping[str, FloatArray] = field(default_factory=dict)
    kept: GlobalModel | None = None


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of a run folder and keeps the `keep` > 0 newest ones."""

    folder: RunFolder
    keep: int
    _bases: dict[int, dict[str, str]] = field(default_factory=dict)
    _memory: MemoryWriter = field(default_factory=MemoryWriter)

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; remove old ones, and later ones of a session that was not resumed.

        Older checkpoints are untouched where the folder cannot be written (RunError).
        """
        name = f"{_FOLDER}/{_round_name(snapshot.rounds)}"
        tensors, own = _flat(snapshot)
        contents = {
            "state.safetensors": save(tensors),
            "state.json": _json({**snapshot.facts, **own}),
        }
        base = self._write_base(snapshot.base)
        memory = self._memory.write(self.folder, _FOLDER, snapshot.rounds, snapshot.memory)
        for file, content in contents.items():
            self.folder.write(f"{name}/{file}", content)
        sums = {file: checksums.sha256(content) for file, content in contents.items()}
        manifest = {"format": _FORMAT, "base": base, "files": sums, "memory": memory}
        self.folder.write(f"{name}/manifest.json", _json(manifest))
        _remove_old(self.folder, snapshot.rounds, self.keep)

    def _write_base(self, base: Base) -> dict[str, str] | None:
        """Write a replaced base once a session; return its name and checksum."""
        if base.tensors is None:
            return None
        if base.root not in self._bases:
            name = f"{_FOLDER}/base-{base.root:06d}.safetensors"
            content = save({n: np.ascontiguousarray(t) for n, t in base.tensors.items()})
            self.folder.write(name, content)
            self._bases = {base.root: {"name": name, "sha256": checksums.sha256(content)}}
        return self._bases[base.root]


def newest(folder: RunFolder, warn: Callable[[str], None]) -> Snapshot | None:
    """Return the newest checkpoint that is whole, or None where there is none.

    A half-written or damaged one is passed over, and `warn` is called with a line about it. Nothing
    is removed. Raises RunFolderError where there are checkpoints, but every one of them is damaged.
    """
    names = _names(folder)
    faults = []
    for name in reversed(names):
        try:
            return _read(folder, f"{_FOLDER}/{name}")
        except _DAMAGE as error:
            faults.append(f"{name}: {error}")
            warn(f"checkpoint {name} is damaged or half written ({error}); using the one before it")
    if any(folder.exists(f"{_FOLDER}/{name}/manifest.json") for name in names):
        raise RunFolderError(
            f"every checkpoint in {child(folder.location, _FOLDER)} is damaged, or of another"
            f" version ({faults[0]})"
        )
    return None


def last_saved(folder: RunFolder) -> int:
    """Return the number of rounds at the newest checkpoint, whole or not; 0 without one."""
    numbers = [name.removeprefix("round-") for name in _names(folder)]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def remove_later(folder: RunFolder, rounds: int) -> None:
    """Remove the checkpoints of later rounds, which `newest` has passed over.

    Called before tables are cut back to `rounds`: `saved_rows` of a later one would miss rows.
    """
    for name in _names(folder):
        if name > _round_name(rounds):
            folder.remove(f"{_FOLDER}/{name}")


def saved_rows(folder: RunFolder) -> dict[str, int]:
    """Return the rows of each table at the newest whole checkpoint; older versions kept none."""
    for name in reversed(_names(folder)):
        try:
            path = f"{_FOLDER}/{name}"
            manifest = json.loads(folder.read(f"{path}/manifest.json"))
            sha256 = manifest["files"]["state.json"]
            facts = json.loads(_checked(folder, f"{path}/state.json", sha256))
            return {str(table): int(rows) for table, rows in facts.get("tables", {}).items()}
        except _DAMAGE:
            continue
    return {}


def _names(folder: RunFolder) -> list[str]:
    return [name for name in folder.names(_FOLDER) if name.startswith("round-")]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _round_name(rounds: int) -> str:
    return f"round-{rounds:06d}"


def _remove_old(folder: RunFolder, rounds: int, keep: int) -> None:
    names = _names(folder)
    # The newest of them up to this one, which may be gone: another process may own the folder now.
    kept = [name for name in names if name <= _round_name(rounds)][-keep:]
    for name in names:
        if name not in kept:
            folder.remove(f"{_FOLDER}/{name}")
    used = {beside for name in kept for beside in _beside(folder, name)}
    for name in folder.names(_FOLDER):
        if name.startswith(("base-", MEMORY_PREFIX)) and f"{_FOLDER}/{name}" not in used:
            folder.remove(f"{_FOLDER}/{name}")


def _beside(folder: RunFolder, name: str) -> list[str]:
    """Return the files beside it that a checkpoint refers to; none where it is damaged."""
    try:
        manifest = json.loads(folder.read(f"{_FOLDER}/{name}/manifest.json"))
        base = [] if manifest["base"] is None else [manifest["base"]]
        return [str(file["name"]) for file in (*base, *manifest.get("memory", []))]
    except _DAMAGE:
        return []


def _flat(snapshot: Snapshot) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return all tensors by a flat name, and what safetensors cannot hold."""
    tensors: dict[str, npt.NDArray[Any]] = {f"held|{n}": v for n, v in snapshot.held.items()}
    tensors |= {f"history|{n}": v for n, v in snapshot.history.items()}
    own_model, facts = _flat_model(snapshot.state, snapshot.base)
    tensors |= own_model
    for name, moments in snapshot.moments.items():
        tensors |= {f"moment|{i}|{name}": moment for i, moment in enumerate(moments)}
    tensors |= {f"shared|{name}": array for name, array in snapshot.shared.items()}
    for client, own in snapshot.personal.items():
        tensors |= {f"personal|{client}|{name}": b for name, b in own.items()}
    facts["rounds"] = snapshot.rounds
    if snapshot.kept is not None:
        kept, of_kept = _flat_model(snapshot.kept.state, snapshot.kept.base)
        tensors |= {f"kept|{name}": tensor for name, tensor in kept.items()}
        facts["kept_model"] = {**of_kept, "trainable": snapshot.kept.trainable}
    # Not `ascontiguousarray`, which gives a single number a dimension.
    return {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, facts


def _flat_model(
    state: AdapterState, base: Base
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return a model's tensors by a flat name, its replaced base left out, and its facts."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, factors in state.factors.items():
        tensors |= {f"factors|{name}|a": factors.a, f"factors|{name}|b": factors.b}
    tensors |= {f"dense|{name}": tensor for name, tensor in state.dense.items()}
    tensors |= {f"merged|{name}": tensor for name, tensor in base.merged.items()}
    facts: dict[str, Any] = {
        "base_root": base.root,
        "base_merges": base.merges,
        "scales": {name: factors.scale for name, factors in state.factors.items()},
        "dense_order": list(state.dense),
    }
    return tensors, facts


def _model(
    tensors: Mapping[str, Any], facts: Mapping[str, Any], saved: Mapping[str, FloatArray] | None
) -> tuple[AdapterState, Base]:
    """Return a model from its flat tensors; `saved` is its replaced base, if any."""
    # Orders come from the JSON: safetensors keeps none.
    factors = {
        name: Factors(tensors[f"factors|{name}|a"], tensors[f"factors|{name}|b"], scale)
        for name, scale in facts["scales"].items()
    }
    dense = {name: tensors[f"dense|{name}"] for name in facts["dense_order"]}
    root, merges = int(facts["base_root"]), int(facts["base_merges"])
    return AdapterState(factors, dense), Base(root, saved, merges, named(tensors, "merged"))


def _kept(tensors: Mapping[str, Any], facts: Mapping[str, Any], base: Base) -> GlobalModel | None:
    """Return the best model so far; `base` is that of the run."""
    found = facts.get("kept_model")
    if found is None:
        return None
    saved = base.tensors if found["base_root"] == base.root else None
    return GlobalModel(*_model(named(tensors, "kept"), found, saved), found["trainable"])


def _checked(folder: RunFolder, name: str, sha256: str) -> bytes:
    content = folder.read(name)
    if checksums.sha256(content) != sha256:
        raise ValueError(f"{name} does not match its checksum")
    return content


def _read(folder: RunFolder, name: str) -> Snapshot:
    manifest = json.loads(folder.read(f"{name}/manifest.json"))
    if manifest["format"] != _FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {_FORMAT}")
    contents = {f: _checked(folder, f"{name}/{f}", s) for f, s in manifest["files"].items()}
    facts = json.loads(contents["state.json"])
    rounds = facts["rounds"]
    if type(rounds) is not int or not name.endswith(f"/{_round_name(rounds)}"):
        raise ValueError(f"it is of round {rounds!r}")
    tensors = load(contents["state.safetensors"])
    saved = None
    if manifest["base"] is not None:
        saved = load(_checked(folder, manifest["base"]["name"], manifest["base"]["sha256"]))
    state, base = _model(tensors, facts, saved)
    moments = numbered(named(tensors, "moment"))
    names = dict.fromkeys(name for named in moments.values() for name in named)
    return Snapshot(
        rounds=rounds,
        state=state,
        base=base,
        held=named(tensors, "held"),
        facts=facts,
        moments={name: tuple(moments[i][name] for i in range(len(moments))) for name in names},
        history=named(tensors, "history"),
        personal=numbered(named(tensors, "personal")),
        memory=read_memory(
            _checked(folder, piece["name"], piece["sha256"]) for piece in manifest.get("memory", [])
        ),
        shared=named(tensors, "shared"),
        kept=_kept(tensors, facts, base),
    )
