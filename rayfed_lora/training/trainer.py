"""Local training and evaluation on torch, the clients of a block together.

The frozen layers run once over the concatenated batches of a block's clients; factors and head act
on each client's rows by batched products. Losses are means by client, summed, so that no client's
gradient sees another client.

Source: local SGD as in FedAvg, arXiv:1602.05629; proximal term: FedProx, arXiv:1812.06127, eq. 2.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

from rayfed_lora.data.client_numbers import ClientSettings
from rayfed_lora.data.columns import LANGUAGE_TASK
from rayfed_lora.data.examples import PIXELS
from rayfed_lora.data.prompts import Answer
from rayfed_lora.data.workload import Workload
from rayfed_lora.errors import BlockMemoryError, RunError
from rayfed_lora.models import base_models
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.attention import choose_attention
from rayfed_lora.models.checkpointing import Checkpointing
from rayfed_lora.models.first_token import read_first_token_only
from rayfed_lora.models.language import language_loss
from rayfed_lora.models.mixing import drops
from rayfed_lora.models.recorded import RecordedPasses
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.objectives.remembered import Remembered
from rayfed_lora.recipe.memory import checkpoints
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Task
from rayfed_lora.tasks.messages import (
    Block,
    Evaluate,
    Export,
    Generate,
    Initial,
    TestClients,
    Train,
)
from rayfed_lora.tasks.training import BlockUpdate, attributed, chosen_weight, trained
from rayfed_lora.training.device import (
    keep_freed_memory,
    memory_watched,
    peak_mb,
    return_freed_memory,
    too_many,
)
from rayfed_lora.training.drawing import Drawing, GroupWork, tensors
from rayfed_lora.training.dropout import ClientDropout
from rayfed_lora.training.finished import Finished, joined
from rayfed_lora.training.gradients import Gradients
from rayfed_lora.training.groups import GroupTask
from rayfed_lora.training.hooks import LocalHooks
from rayfed_lora.training.optimizing import (
    add_proximal_gradient,
    clip_by_client,
    cut_to,
    fresh_optimizer,
)
from rayfed_lora.training.proof import judged
from rayfed_lora.training.testing import Evaluator, know_threads
from rayfed_lora.training.weights import Weights, assembled, built_weights
from rayfed_lora.types import AdapterState, Base, Device, GlobalModel, LocalPlan, ModelShape

if TYPE_CHECKING:
    from rayfed_lora.training.generating import Generating

R = TypeVar("R")
# Held by who draws from torch's own state, which is that of the whole process.
_DRAWING = Lock()


class LocalTrainer:
    """Trains blocks of clients on one resident model, the clients of a block together.

    Where they cannot be (a full-model round, or the model's `obstacle`), one after the other.
    """

    def __init__(
        self,
        recipe: Recipe,
        workload: Workload,
        device: str = "cpu",
        weights: Weights | None = None,
    ) -> None:
        """Build the model once; it is loaded anew for each block.

        Args:
            recipe: the run.
            workload: its data, from `prepare`.
            device: a torch device.
            weights: from `built_weights`, shared with others and never written to; None: made
                here.

        Raises:
            ModelError: the weights cannot be read, or the adapter does not fit the model.
        """
        torch.set_num_threads(recipe.runtime.threads_per_actor)
        keep_freed_memory()
        self._recipe = recipe
        self._workload = workload
        self._device = torch.device(device)
        self._kind: Device = "cpu" if self._device.type == "cpu" else "cuda"
        config = base_models.restored(workload.config)
        self._shape = model_shape(base_models.skeleton(recipe.model, config), recipe)
        weights = weights or built_weights(recipe, workload)
        self._shape = judged(self._shape, weights.verdict, recipe)
        self._weights = weights
        self._generating: Generating | None = None
        net = assembled(recipe, workload, weights)
        choose_attention(net, self._device)
        modules = list(self._shape.modules)
        self._model = AdaptedModel(net, recipe.adapter, device, self._shape.obstacle, modules)
        two = tensors(workload.train.rows(np.arange(min(2, len(workload.train)))), self._device)[0]
        self._language = None
        if recipe.model.task == LANGUAGE_TASK:
            self._language = language_loss(net, two)
        else:
            read_first_token_only(net, two)
        self._weigh = chosen_weight(recipe)
        self._drops = recipe.adapter.dropout > 0 or drops(net)
        self._drawing = Drawing(recipe, workload, drops=self._drops)
        self._checkpointing = Checkpointing(net)
        self._passes = RecordedPasses(self._model, recording=self._recordable())
        self._most_examples = ClientSettings.of(recipe, workload.devices).most_examples
        self._gradients = Gradients(
            recipe, self._passes, self._language, self._device, self._most_examples
        )
        self._testing = Evaluator(recipe, workload, self._model, self._passes, self._language)

    def _recordable(self) -> bool:
        """Return whether the operations of a pass follow from shapes alone: not with masks."""
        runtime = self._recipe.runtime
        plain = runtime.precision == "fp32" and not self._drops
        plain = plain and runtime.checkpoint_activations is not True
        return plain and [*self._workload.train.inputs] == [PIXELS] and self._device.type == "cpu"

    def shape(self) -> ModelShape:
        """Return the model's sizes."""
        return self._shape

    def run(self, task: Task[R]) -> R:
        """Answer a task.

        Raises:
            ClientError: a client's training raised; names the client and the round.
            BlockMemoryError: a block does not fit into memory.
            RunError: each client can be trained alone, but not the block.
        """
        found: Any
        if isinstance(task, Train):
            found = trained(task, partial(self._train_block, task), self._weigh)
        elif isinstance(task, Generate):
            found = self._answers(task)
        elif isinstance(task, Evaluate):
            found = tuple(self._testing.evaluate(task))
        elif isinstance(task, TestClients):
            found = self._testing.test_clients(task)
        elif isinstance(task, Export):
            found = self._export(task.model)
        elif isinstance(task, Initial):
            found = self._model.initial_tensors(task.trainable)
        else:
            raise TypeError(f"expected a task of rayfed_lora.tasks, got {type(task).__name__}")
        return cast(R, found)

    def _train_block(
        self, task: Train, block: Block, starts: Sequence[AdapterState]
    ) -> BlockUpdate:
        """Train the clients of a block together, or one after the other where they cannot be."""
        plan, base = task.plan, task.model.base
        start_of = dict(zip(block, starts, strict=True))
        alone = plan.trainable == "full" or self._model.obstacle is not None
        together = None
        if len(block) > 1 and not alone:
            group = self._drawing.group(block, plan)
            try:
                with memory_watched(too_many(block)), self._taking_turns():
                    return self._train_group(group, start_of, base, plan, task.remembered)
            except BlockMemoryError:
                raise
            except Exception:
                # As text: the error itself would keep all that the block has made.
                together = traceback.format_exc()
        updates = []
        for client in block:
            group = self._drawing.group([client], plan)
            with (
                attributed(client, plan.round),
                memory_watched(too_many([client])),
                self._taking_turns(),
            ):
                own = {client: start_of[client]}
                update = self._train_group(group, own, base, plan, task.remembered)
                updates.append(update)
        if together is not None:
            # Each of them can be trained alone: it is the block that fails.
            raise RunError(
                f"round {plan.round + 1}: {len(block)} clients from {block[0]} on cannot be trained"
                f" together; lower runtime.cohort_size\n{together}"
            )
        return joined(updates)

    def _taking_turns(self) -> AbstractContextManager[object]:
        """Wait for other trainers of this process, where the model may draw."""
        return _DRAWING if self._drops else nullcontext()

    def _train_group(
        self,
        work: GroupWork,
        start_of: Mapping[int, AdapterState],
        base: Base,
        plan: LocalPlan,
        remembered: Remembered,
    ) -> BlockUpdate:
        """Train some clients in the same batches; the results are those of each one alone.

        Args:
            work: their batches; the client with most steps comes first.
            start_of: their states, in the order of the updates.
            base: what is frozen.
            plan: the round.
            remembered: the objective, and what these clients and the server remember for it.
        """
        began = time.perf_counter()
        know_threads()
        self._passes.left = self._recipe.annealing.total_rounds / (plan.round + 1) - 1
        settings, group = self._recipe.clients, work.group
        starts = [start_of[task.client] for task in group.tasks]
        self._model.load(starts, base, plan.trainable, plan.frozen)
        # After loading. What draws outside of `ClientDropout` draws from torch's own state.
        _seed(work.seeds[0], self._device)
        self._model.train(True)
        parameters = self._model.trained
        clients = [task.client for task in group.tasks]
        optimizer = fresh_optimizer(parameters, settings, [plan.lr_of(k) for k in clients])
        dropout = ClientDropout(work.seeds, self._device) if self._drops else None
        on = checkpoints(self._recipe, self._shape, len(starts), self._kind, self._most_examples)
        self._checkpointing.switch(on=on, contexts=None if dropout is None else dropout.contexts)
        hooks = LocalHooks(remembered, self._model, clients, plan)
        keep = plan.proximal_weight > 0 or hooks.correcting
        received = [p.detach().clone() for p in parameters] if keep else []
        finished = Finished(self._model, starts)
        losses: list[torch.Tensor] = []
        read = self._drawing.batches(work, self._device)
        for step, (batch, own) in enumerate(zip(group.batches, read, strict=True)):
            if finished.leave(len(batch.examples)):
                cut_to(optimizer, len(batch.examples))
            # What `optimizer.zero_grad` does, without its hooks: 0.2 ms a step.
            for parameter in parameters:
                parameter.grad = None
            losses.append(
                self._gradients.add(batch, own, hooks.loss, dropout, learns=bool(parameters))
            )
            if optimizer is None:
                continue
            if plan.proximal_weight > 0:
                add_proximal_gradient(parameters, received, plan.proximal_weight)
            if hooks.correcting:
                hooks.correct(received, step)
            if settings.max_grad_norm is not None:
                clip_by_client(parameters, settings.max_grad_norm, len(batch.examples))
            optimizer.step()
        finished.leave(0)
        seconds = (time.perf_counter() - began) / len(starts)
        update = finished.update(work.group.tasks, [*start_of], losses, seconds)
        return update if self._language is None else self._measured(update, work.group)

    def _answers(self, task: Generate) -> tuple[Answer, ...]:
        if self._generating is None:
            # Here: it imports transformers' generation.
            from rayfed_lora.training.generating import Generating

            if self._workload.prompts is None:
                raise ValueError("need prompts to answer, evaluation.generate has none")
            self._generating = Generating(self._recipe, self._workload.prompts, self._model)
        return self._generating.answers(task)

    def _measured(self, update: BlockUpdate, group: GroupTask) -> BlockUpdate:
        """Return the update of a language model's clients with tokens and memory."""
        peak, rows = peak_mb(self._device), {task.client: task.batches for task in group.tasks}
        reports = [
            replace(report, tokens=self._drawing.tokens(rows[report.client]), peak_mb=peak)
            for report in update.reports
        ]
        return replace(update, reports=tuple(reports))

    def _export(self, model: GlobalModel) -> dict[str, bytes]:
        """Return `adapter/...` and, where a user could not get the base elsewhere, `base/...`."""
        # Training is over.
        return_freed_memory()
        # peft is imported for this only: no client needs it.
        from rayfed_lora.models import export

        self._model.load([model.state], model.base, model.trainable)
        everything, random = self._model.tensors("full"), self._weights.random
        net = assembled(self._recipe, self._workload, self._weights)
        return export.trained_files(self._recipe, self._workload, model, net, random, everything)


def _seed(seed: int, device: torch.device) -> None:
    """Seed torch's own state, where a forward pass on the device draws from it."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
