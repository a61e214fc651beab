"""What an executor asks of a trainer. Imports no torch, so that fakes need none.

Source: this project.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rayfed_lora.errors import BlockMemoryError, ClientError
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientScore,
    ClientUpdate,
    FloatArray,
    LocalPlan,
    ModelShape,
    Predictions,
    Split,
    Trainable,
)


class Trainer(Protocol):
    """What an executor runs, in this process or in an actor. Stateless between calls."""

    def shape(self) -> ModelShape:
        """Return the model's sizes."""
        ...

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors the first round starts from, by parameter name."""
        ...

    def draw(self, clients: Sequence[int], plan: LocalPlan) -> object:
        """Return what `train` needs of a block that takes no model, such as its batches.

        Called while this or another trainer of the process trains; all of them draw the same.

        Raises:
            ClientError: a client's batches cannot be drawn.
        """
        ...

    def train(
        self,
        clients: Sequence[int],
        starts: Sequence[AdapterState],
        base: Base,
        plan: LocalPlan,
        drawn: object = None,
    ) -> Iterator[ClientUpdate]:
        """Train each client of a block from its state; one update a client, in the same order.

        Args:
            clients: the block.
            starts: a state of each.
            base: what is frozen.
            plan: the round.
            drawn: what `draw` of a trainer like this one has returned for the same; None: draw.

        Raises:
            ClientError: a client's training raised.
            BlockMemoryError: the block does not fit into memory.
        """
        ...

    def evaluate(
        self, split: Split, rows: slice, state: AdapterState, base: Base, trainable: Trainable
    ) -> Predictions:
        """Return the predictions on some rows of a split under `state`."""
        ...

    def test_clients(
        self,
        clients: Sequence[int],
        starts: Sequence[AdapterState],
        base: Base,
        trainable: Trainable,
    ) -> list[ClientScore]:
        """Return how each client's state does on the client's own held-out examples."""
        ...

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return the files of the trained model, by path inside the run folder."""
        ...


@contextmanager
def attributed(client: int, round_index: int) -> Iterator[None]:
    """Turn whatever a client's training raises into a ClientError that names it.

    A shortage of memory is the block's, not the client's.
    """
    try:
        yield
    except BlockMemoryError:
        raise
    except Exception as error:
        raise ClientError(client, round_index, traceback.format_exc()) from error
