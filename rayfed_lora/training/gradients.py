"""The gradients of a step of a group of clients, over its micro-batches.

Source: this project; mini-batches in parts as in gradient accumulation, by examples or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from rayfed_lora.models.language import LanguageLoss, targets_of
from rayfed_lora.models.recorded import RecordedPasses
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.drawing import Tensors, chosen
from rayfed_lora.training.dropout import ClientDropout
from rayfed_lora.training.groups import GroupBatch
from rayfed_lora.training.hooks import Loss


class Gradients:
    """Computes losses of batches and adds up their gradients in the trained tensors."""

    def __init__(
        self,
        recipe: Recipe,
        passes: RecordedPasses,
        language: LanguageLoss | None,
        device: torch.device,
        size: int,
    ) -> None:
        """Compute with the model of a trainer.

        Args:
            recipe: the run.
            passes: of the model.
            language: the loss of a language model; None: a classifier.
            device: of the model.
            size: most examples of a client in a micro-batch.
        """
        self._size, self._bf16 = size, recipe.runtime.precision == "bf16"
        self._passes, self._language, self._device = passes, language, device

    def add(
        self,
        batch: GroupBatch,
        read: Tensors,
        loss: Loss,
        dropout: ClientDropout | None,
        *,
        learns: bool,
    ) -> torch.Tensor:
        """Add the gradient of each client's mean loss on its part of a batch; return these losses.

        No graph stays: one that lived on would hold the next one to the present number of clients.

        Args:
            batch: of one optimiser step; computed in micro-batches.
            read: its inputs and labels, in the order of `batch.indices`.
            loss: of a classifier, by example.
            dropout: draws by client; None: the model draws nothing.
            learns: whether there is anything to train.
        """
        parts = batch.parts(self._size)
        tokens = None
        if self._language is not None:
            # A mean over the tokens of a client in the whole step, not over its texts.
            own = torch.from_numpy(batch.weights > 0).to(self._device)
            counted = targets_of(read[0])[1].sum(dim=1).view(own.shape)
            tokens = (counted * own).sum(dim=1).clamp(min=1)
        found = []
        for part in parts:
            given = read if len(parts) == 1 else chosen(*read, torch.from_numpy(part.indices))
            weights = torch.from_numpy(part.weights).to(self._device)
            if dropout is not None:
                dropout.step(part.examples)
            with dropout or nullcontext():
                each = self.losses(*given, weights, loss, tokens)
                if learns:
                    each.sum().backward()  # type: ignore[no-untyped-call]
            found.append(each.detach())
            del each
        return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)

    def losses(
        self,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        weights: torch.Tensor,
        loss: Loss,
        tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the loss of each client on its part of a micro-batch.

        It is a sum of weighted examples or, over `tokens` (clients,), of the losses of tokens.
        """
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            if self._language is not None and tokens is not None:
                each = self._language(inputs).losses.view(weights.shape)
                return (each * (weights > 0)).sum(dim=1) / tokens
            logits = self._passes.logits(inputs)
        each = loss(logits.float(), labels)
        return (each.view(weights.shape) * weights).sum(dim=1)
