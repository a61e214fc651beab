"""Digests of a workload, which decide whether a run may resume. Source: this project."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from rayfed_lora.data.examples import Examples
from rayfed_lora.data.workload import Workload


def with_fingerprint(workload: Workload) -> Workload:
    """Return the workload with its fingerprint, a SHA-256 of each part that a run depends on."""
    names, held_out, trace = workload.client_names, workload.held_out, workload.trace
    tables = [workload.clients, *([] if held_out is None else [held_out])]
    devices: list[Any] = [
        part for name in sorted(workload.columns) for part in (name, workload.columns[name])
    ]
    if trace is not None:
        devices += [trace.client, trace.start_s, trace.end_s]
    fingerprint = {
        "training examples": _examples(workload.train),
        "validation examples": _examples(workload.validation),
        "test examples": _examples(workload.test),
        "names of classes": _sha256(workload.label_names),
        "names of clients": _sha256([] if names is None else names.to_pylist()),
        "examples of each client": _sha256(part for t in tables for part in (t.order, t.offsets)),
        "devices of clients": _sha256(devices),
    }
    return replace(workload, fingerprint=fingerprint)


def _examples(examples: Examples) -> str:
    if len(examples) == 0:
        return _sha256([])
    inputs = sorted(examples.inputs.items())
    return _sha256([*(part for pair in inputs for part in pair), examples.labels])


def _sha256(parts: Iterable[Any]) -> str:
    """Return the digest of texts and arrays, each preceded by its size."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            content: Any = part.encode("utf-8", "surrogatepass")
            digest.update(f"text {len(content)}\n".encode())
        else:
            content = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            digest.update(f"{part.dtype} {part.shape}\n".encode())
        digest.update(content)
    return digest.hexdigest()
