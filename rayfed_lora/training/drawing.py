"""What a group of clients needs that takes no model, drawn ahead of its turn.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from rayfed_lora.data.examples import PIXELS, Batch
from rayfed_lora.data.workload import Workload
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, torch_seed
from rayfed_lora.training.groups import ClientTask, GroupTask
from rayfed_lora.training.protocol import attributed
from rayfed_lora.types import LocalPlan

# Inputs by argument name, and labels.
Tensors = tuple[Mapping[str, torch.Tensor], torch.Tensor]
# Bytes of images that a block reads at once for all its steps, and how memory of torch is aligned.
_READ_AT_ONCE, _ALIGNED = 1 << 22, 64


class GroupWork(NamedTuple):
    """What is drawn for a group.

    Attributes:
        group: the clients and their batches.
        seeds: of what the model draws, one a client; of the first client only where it draws
            nothing that is known of.
        read: the examples of all batches, one batch after the other, in the host's memory; None:
            they are read in their turn.
    """

    group: GroupTask
    seeds: Sequence[int]
    read: Tensors | None


class Drawing:
    """Draws what groups of clients need, in any thread."""

    def __init__(self, recipe: Recipe, workload: Workload, *, drops: bool) -> None:
        """Draw nothing yet.

        Args:
            recipe: the run.
            workload: its data.
            drops: whether the model draws in training.
        """
        self._recipe, self._workload, self._drops = recipe, workload, drops
        # Of an image; 0 for what is cut to size batch by batch, or would not lie as a batch alone.
        images = [*workload.train.inputs] == [PIXELS]
        row_bytes = workload.train.inputs[PIXELS][:1].nbytes if images else 0
        self._row_bytes = row_bytes if row_bytes % _ALIGNED == 0 else 0

    def group(self, clients: Sequence[int], plan: LocalPlan, *, ahead: bool) -> GroupWork:
        """Draw the work of clients that are trained together.

        Args:
            clients: of the group.
            plan: the round.
            ahead: whether to read small images too, up to 4 MB of them.

        Raises:
            ClientError: a client's cannot be drawn; names the client and the round.
        """
        settings, seed, table = self._recipe.clients, self._recipe.seed, self._workload.clients
        tasks = []
        for client in clients:
            with attributed(client, plan.round):
                tasks.append(ClientTask.of(client, table.examples(client), settings, seed, plan))
        group = GroupTask.of(tasks)
        drawing = group.tasks if self._drops else group.tasks[:1]
        seeds = [torch_seed(seed, Purpose.DROPOUT, plan.round, task.client) for task in drawing]
        read = None
        if ahead:
            # What goes wrong is for its turn, which knows what to do.
            with suppress(Exception):
                read = self._read(group)
        return GroupWork(group, seeds, read)

    def _read(self, group: GroupTask) -> Tensors | None:
        """Read the images of all batches, if they are small; else None."""
        indices = [batch.indices for batch in group.batches]
        small = 0 < sum(map(len, indices)) * self._row_bytes <= _READ_AT_ONCE
        return tensors(self._workload.train.rows(np.concatenate(indices))) if small else None

    def batches(self, work: GroupWork, device: torch.device) -> Iterator[Tensors]:
        """Yield inputs and labels of each batch, on a device."""
        batches = [batch.indices for batch in work.group.batches]
        read = self._read(work.group) if work.read is None else work.read
        if read is None:
            for indices in batches:
                yield tensors(self._workload.train.rows(indices), device)
            return
        inputs, labels = read
        sizes = [len(indices) for indices in batches]
        parts = {n: torch.split(tensor.to(device), sizes) for n, tensor in inputs.items()}
        for step, of in enumerate(torch.split(labels.to(device), sizes)):
            yield {name: each[step] for name, each in parts.items()}, of


def tensors(examples: Batch, device: torch.device | str = "cpu") -> Tensors:
    """Return examples as tensors: what is not floating point as int64, as embeddings want it."""
    inputs = {}
    for name, values in examples.inputs.items():
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        inputs[name] = (tensor if tensor.is_floating_point() else tensor.long()).to(device)
    return inputs, torch.from_numpy(examples.labels).to(device)
