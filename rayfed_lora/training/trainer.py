"""Local training and evaluation on torch, one client at a time.

Source: local SGD as in FedAvg, arXiv:1602.05629; proximal term: FedProx, arXiv:1812.06127, eq. 2.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rayfed_lora.data.batches import batch_indices
from rayfed_lora.data.examples import Examples
from rayfed_lora.models import export, sources
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.recipe import Clients, Recipe
from rayfed_lora.seeds import Purpose, generator, torch_seed
from rayfed_lora.training.protocol import attributed
from rayfed_lora.training.workload import Workload
from rayfed_lora.types import (
    AdapterState,
    Base,
    ClientUpdate,
    EvaluationSums,
    FloatArray,
    LocalPlan,
    ModelShape,
    Split,
    Trainable,
)


class LocalTrainer:
    """Trains one client after the other on one resident model."""

    def __init__(self, recipe: Recipe, workload: Workload, device: str = "cpu") -> None:
        """Build the model once; it is loaded anew for each client.

        Args:
            recipe: the run.
            workload: its data, from `prepare`.
            device: a torch device.
        """
        torch.set_num_threads(recipe.runtime.threads_per_actor)
        self._recipe = recipe
        self._workload = workload
        self._device = torch.device(device)
        self._model = AdaptedModel(self._build, recipe.adapter, device)

    def _build(self) -> nn.Module:
        config = sources.restored(self._workload.config)
        return sources.build(self._recipe.model, config, self._recipe.seed)

    def shape(self) -> ModelShape:
        """Return the model's sizes; raises ModelError where the adapter does not fit it."""
        config = sources.restored(self._workload.config)
        return model_shape(sources.skeleton(self._recipe.model, config), self._recipe)

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the head's tensors, or in a full-model round all, as built from the seed."""
        return self._model.initial_tensors(trainable)

    def train(
        self, clients: Sequence[int], state: AdapterState, base: Base, plan: LocalPlan
    ) -> list[ClientUpdate]:
        """Train each client of a block from `state`.

        Raises:
            ClientError: a client's training raised; names the client and the round.
        """
        updates = []
        for client in clients:
            with attributed(client, plan.round):
                updates.append(self._train_client(client, state, base, plan))
        return updates

    def _train_client(
        self, client: int, state: AdapterState, base: Base, plan: LocalPlan
    ) -> ClientUpdate:
        began = time.perf_counter()
        settings, seed = self._recipe.clients, self._recipe.seed
        examples = self._workload.clients.examples(client)
        batches = batch_indices(
            examples,
            settings.batch_size,
            generator(seed, Purpose.BATCHES, plan.round, client),
            steps=settings.steps,
            epochs=settings.local_epochs,
        )
        self._model.load(state, base, plan.trainable)
        # After loading, which may build a model and draw for it.
        torch.manual_seed(torch_seed(seed, Purpose.DROPOUT, plan.round, client))
        losses = self._steps(list(self._model.parameters(state).values()), batches, plan)
        update = self._model.read(state)
        error = _fault(losses, update)
        return ClientUpdate(
            client=client,
            examples=len(examples),
            state=update if error is None else None,
            train_loss=float(np.mean(losses)) if error is None else float("nan"),
            seconds=time.perf_counter() - began,
            error=error,
        )

    def _steps(
        self, parameters: list[nn.Parameter], batches: list[Any], plan: LocalPlan
    ) -> list[float]:
        """Take one optimiser step a batch; return the losses, without the proximal term."""
        settings = self._recipe.clients
        optimizer = _optimizer(parameters, settings, plan.lr)
        received = [p.detach().clone() for p in parameters] if plan.proximal_weight > 0 else []
        self._model.net.train()
        losses = []
        for batch in batches:
            loss = self._loss(self._workload.train.rows(batch))
            losses.append(loss.detach())
            if optimizer is None:
                continue
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            _add_proximal_gradient(parameters, received, plan.proximal_weight)
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
        return [float(loss) for loss in torch.stack(losses).cpu()]

    def _loss(self, examples: Examples) -> torch.Tensor:
        inputs, labels = _tensors(examples, self._device)
        bf16 = self._recipe.runtime.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            logits = self._model.net(**inputs).logits
        return functional.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def evaluate(
        self, split: Split, rows: slice, state: AdapterState, base: Base, trainable: Trainable
    ) -> EvaluationSums:
        """Return the sums over some rows of a split, always in float32 arithmetic."""
        held = self._workload.test if split == "test" else self._workload.validation
        self._model.load(state, base, trainable)
        self._model.net.eval()
        examples = held.rows(np.arange(len(held))[rows])
        inputs, labels = _tensors(examples, self._device)
        logits = self._model.net(**inputs).logits.float()
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return EvaluationSums(
            len(examples), float(loss), int((logits.argmax(dim=1) == labels).sum())
        )

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return `adapter/...` and, where a user could not get the base elsewhere, `base/...`."""
        self._model.load(state, base, trainable)
        everything = self._model.tensors("full")
        changed = base.root > 0 or bool(base.folds) or trainable == "full"
        new_head = not self._recipe.adapter.train_head
        own_config = self._recipe.model.source == "config" or bool(self._recipe.model.config)
        keep_base = changed or new_head or own_config
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            net = self._build()
            if trainable == "adapter":
                name = "base" if keep_base else sources.location(self._recipe.model.source)
                export.write_adapter(folder / "adapter", state, net, self._recipe.adapter, name)
            if keep_base:
                export.write_base(folder / "base", net, everything)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _optimizer(
    parameters: list[nn.Parameter], settings: Clients, lr: float
) -> torch.optim.Optimizer | None:
    """Return a fresh optimiser; None where nothing is trained (rank 0 and no head)."""
    chosen = settings.optimizer
    if not parameters:
        return None
    if chosen.name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=chosen.weight_decay)
    return torch.optim.SGD(
        parameters, lr=lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay
    )


def _add_proximal_gradient(
    parameters: list[nn.Parameter], received: list[torch.Tensor], weight: float
) -> None:
    """Add the gradient of (weight / 2) * ||theta - theta_received||^2."""
    for parameter, anchor in zip(parameters, received, strict=False):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=weight)


def _tensors(
    examples: Examples, device: torch.device
) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    inputs = {}
    for name, values in examples.inputs.items():
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        inputs[name] = (tensor if tensor.is_floating_point() else tensor.long()).to(device)
    return inputs, torch.from_numpy(examples.labels).to(device)


def _fault(losses: list[float], update: AdapterState) -> str | None:
    """Return why a trained client cannot be used, or None."""
    bad = [step for step, loss in enumerate(losses) if not np.isfinite(loss)]
    if bad:
        return f"loss is {losses[bad[0]]} in local step {bad[0] + 1} of {len(losses)}"
    tensors = [*update.dense.values()]
    for factors in update.factors.values():
        tensors += [factors.a, factors.b]
    if not all(np.isfinite(tensor).all() for tensor in tensors):
        return f"weights are not finite after {len(losses)} local steps"
    return None
