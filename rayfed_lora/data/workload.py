"""The data of a recipe in the form that client actors share. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.data.examples import Examples
from rayfed_lora.types import AvailabilityTrace, DeviceFacts


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
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> DeviceFacts:
        """The facts about clients that the simulated clock uses."""
        return DeviceFacts(self.clients.counts, self.columns, self.trace)
