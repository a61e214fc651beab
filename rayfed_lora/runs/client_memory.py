"""The memory of clients beside a run's checkpoints: pieces of the clients that have changed.

`checkpoints/memory-000012.safetensors` holds the clients whose memory has changed since the
checkpoint before round 12's; later pieces win. A checkpoint names its pieces, so that it costs as
much as what has changed. Pieces that hold more than twice the clients that have memory are replaced
by one of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from rayfed_lora.runs import checksums
from rayfed_lora.storage import RunFolder
from rayfed_lora.types import FloatArray

MEMORY_PREFIX = "memory-"
Memory = Mapping[int, Mapping[str, FloatArray]]


@dataclass
class MemoryWriter:
    """Writes the memory of clients, in a process's first checkpoint all of it."""

    _written: dict[int, Mapping[str, FloatArray]] = field(default_factory=dict)
    _pieces: list[dict[str, str]] = field(default_factory=list)
    # Number of clients in all pieces, repeated ones counted again.
    _held: int = 0

    def write(
        self, folder: RunFolder, within: str, rounds: int, memory: Memory
    ) -> list[dict[str, str]]:
        """Write what has changed; return name and checksum of each piece, the oldest first.

        Args:
            folder: of the run.
            within: its folder of checkpoints.
            rounds: number of finished rounds.
            memory: of all clients; the arrays of a client are replaced, never written to.
        """
        # Unchanged ones are the same objects.
        new = {k: own for k, own in memory.items() if self._written.get(k) is not own}
        gone = self._written.keys() - memory.keys()
        if gone or self._held + len(new) > 2 * len(memory):
            new, self._pieces, self._held = dict(memory), [], 0
        if new:
            name = f"{within}/{MEMORY_PREFIX}{rounds:06d}.safetensors"
            flat = {
                f"{k}|{n}": np.asarray(t, order="C")
                for k, own in new.items()
                for n, t in own.items()
            }
            content = save(flat)
            folder.write(name, content)
            piece = {"name": name, "sha256": checksums.sha256(content)}
            self._pieces, self._held = [*self._pieces, piece], self._held + len(new)
        self._written = dict(memory)
        return self._pieces


def read_memory(pieces: Iterable[bytes]) -> dict[int, dict[str, Any]]:
    """Return the memory of clients from their pieces, the oldest first."""
    found: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        found |= numbered(load(piece))
    return found


def named(tensors: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return the tensors of a group, by their names inside it, in order: files have none."""
    prefix = f"{group}|"
    return {
        name[len(prefix) :]: tensors[name] for name in sorted(tensors) if name.startswith(prefix)
    }


def numbered(tensors: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return tensors by the number and the rest of their names, in order: files have none."""
    found: dict[int, dict[str, Any]] = {}
    for name, tensor in sorted(tensors.items(), key=itemgetter(0)):
        number, _, rest = name.partition("|")
        found.setdefault(int(number), {})[rest] = tensor
    return found
