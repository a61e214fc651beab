"""A recipe's data, made ready: what client actors share. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfed_lora.data.examples import Examples
from rayfed_lora.data.partition import ClientTable
from rayfed_lora.types import DeviceFacts, Trace


@dataclass(frozen=True)
class Workload:
    """Everything an actor needs beside the model; arrays only, so that it is shared, not copied.

    Attributes:
        train, validation, test: model-ready examples; validation is empty where none is kept.
        clients: which rows of `train` each client trains on.
        label_names: name of class i at place i.
        config: transformers' configuration of the model, as a dictionary.
        held_out: which rows of `train` each client is tested on; None where none are kept.
        columns: (clients,) numbers that say what clients' devices are like, by data column.
        trace: when clients can be reached; None: always.
        notes: what the user should know of how the data were read, one line each.
        client_names: (clients,) texts: what the data call each client; None where they do not.
        fingerprint: digest by part of the data, empty where none was made.
    """

    train: Examples
    validation: Examples
    test: Examples
    clients: ClientTable
    label_names: tuple[str, ...]
    config: dict[str, Any]
    held_out: ClientTable | None = None
    columns: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    trace: Trace | None = None
    notes: tuple[str, ...] = ()
    client_names: pa.Array | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> DeviceFacts:
        """What the simulated clock needs to know of clients."""
        return DeviceFacts(self.clients.counts, self.columns, self.trace)
