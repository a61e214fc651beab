"""What a group of clients needs that takes no model: its batches and seeds.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from rayfed_lora.data.examples import PIXELS, Batch
from rayfed_lora.data.workload import Workload
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, torch_seed
from rayfed_lora.tasks.training import attributed
from rayfed_lora.training.groups import ClientTask, GroupTask
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
    """

    group: GroupTask
    seeds: Sequence[int]


class Drawing:
    """Draws what groups of clients need."""

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

    def group(self, clients: Sequence[int], plan: LocalPlan) -> GroupWork:
        """Draw the batches and seeds of clients that are trained together.

        Args:
            clients: of the group.
            plan: the round.

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
        return GroupWork(group, seeds)

    def batches(self, work: GroupWork, device: torch.device) -> Iterator[Tensors]:
        """Yield inputs and labels of each batch, on a device; small images are read at once."""
        batches = [batch.indices for batch in work.group.batches]
        sizes = [len(indices) for indices in batches]
        if not 0 < sum(sizes) * self._row_bytes <= _READ_AT_ONCE:
            for indices in batches:
                yield tensors(self._workload.train.rows(indices), device)
            return
        inputs, labels = tensors(self._workload.train.rows(np.concatenate(batches)), device)
        parts = {name: torch.split(tensor, sizes) for name, tensor in inputs.items()}
        for step, of in enumerate(torch.split(labels, sizes)):
            yield {name: each[step] for name, each in parts.items()}, of


def chosen(inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, rows: torch.Tensor) -> Tensors:
    """Return some rows of a batch, cut to the longest text among them."""
    rows = rows.to(labels.device)
    found = {name: values[rows] for name, values in inputs.items()}
    mask = found.get("attention_mask")
    if mask is not None:
        length = max(int(mask.sum(dim=1).max()), 1)
        found = {name: values[:, :length] for name, values in found.items()}
    return found, labels[rows]


def tensors(examples: Batch, device: torch.device | str = "cpu") -> Tensors:
    """Return examples as tensors: what is not floating point as int64, as embeddings want it."""
    inputs = {}
    for name, values in examples.inputs.items():
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        inputs[name] = (tensor if tensor.is_floating_point() else tensor.long()).to(device)
    return inputs, torch.from_numpy(examples.labels).to(device)
