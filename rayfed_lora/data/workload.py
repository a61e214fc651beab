"""The data of a recipe in the form that client actors share, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.data.examples import Examples
from rayfed_lora.data.prompts import Prompts
from rayfed_lora.lora.states import sha256 as state_sha256
from rayfed_lora.types import AdapterState, AvailabilityTrace, DeviceFacts


@dataclass(frozen=True)
class Workload:
    """All that an actor needs beside the model; arrays, so that actors share their memory.

    Attributes:
        train, validation, test: model-ready examples; validation may be empty.
        clients: which rows of `train` each client trains on.
        label_names: name of class i at place i.
        config: transformers' configuration of the model, as a dictionary.
        held_out: which rows of `train` each client is tested on; None where there are none.
        columns: (clients,) properties of clients' devices, by data column.
        trace: when clients are available; None: always.
        notes: messages for the user on how the data were read, one line each.
        client_names: (clients,) the clients' names in the data; None where they have none.
        float_pixels: whether the pixels of images are given as floats, and kept as they are.
        chat_template: the Jinja text of the template that turns were rendered with, where it is not
            the tokenizer's own.
        start: the adapter that the run starts from; None: new factors.
        prompts: that the trained model answers; None: none are asked.
        fingerprint: digest by part of the data; empty where none was computed.
    """

    train: Examples
    validation: Examples
    test: Examples
    clients: ClientTable
    label_names: tuple[str, ...]
    config: dict[str, Any]
    held_out: ClientTable | None = None
    columns: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    trace: AvailabilityTrace | None = None
    notes: tuple[str, ...] = ()
    client_names: pa.Array | None = None
    float_pixels: bool = False
    chat_template: str | None = None
    start: AdapterState | None = None
    prompts: Prompts | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> DeviceFacts:
        """The facts about clients that the simulated clock uses."""
        return DeviceFacts(self.clients.counts, self.columns, self.trace)


def with_fingerprint(workload: Workload) -> Workload:
    """Return the workload with a SHA-256 of each part that decides whether a run may resume."""
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
    if workload.start is not None:
        fingerprint["the adapter to start from"] = state_sha256(workload.start)
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
