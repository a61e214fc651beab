"""Local training and evaluation on torch, the clients of a block together.

The frozen layers run once over the concatenated batches of a block's clients; factors and head act
on each client's rows by batched products. Losses are means by client, summed, so that no client's
gradient sees another client.

Source: local SGD as in FedAvg, arXiv:1602.05629; proximal term: FedProx, arXiv:1812.06127, eq. 2.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from rayfed_lora.data.examples import PIXELS
from rayfed_lora.data.tables import LANGUAGE_TASK
from rayfed_lora.data.workload import Workload
from rayfed_lora.errors import BlockMemoryError, RunError
from rayfed_lora.models import loading, sources
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.attention import choose_attention
from rayfed_lora.models.first_token import read_first_token_only
from rayfed_lora.models.mixing import Verdict, drops
from rayfed_lora.models.recorded import RecordedPasses
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training import python_lock
from rayfed_lora.training.drawing import Drawing, GroupWork, tensors
from rayfed_lora.training.dropout import ClientDropout
from rayfed_lora.training.losses import token_losses
from rayfed_lora.training.memory import keep_freed_memory, memory_watched, return_freed_memory
from rayfed_lora.training.optimizing import (
    add_proximal_gradient,
    clip_by_client,
    cut_to,
    fresh_optimizer,
)
from rayfed_lora.training.proof import examined, judged
from rayfed_lora.training.protocol import attributed
from rayfed_lora.training.results import Left, all_finite, update_of
from rayfed_lora.training.testing import Testing, know_threads
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

# Held by who draws from torch's own state, which is that of the whole process.
_DRAWING = Lock()


@dataclass(frozen=True)
class Weights:
    """A base model, the same for all trainers of a run; depends on data and model only.

    Attributes:
        arrays: the weights of the source, by parameter and buffer name.
        verdict: whether the model computes examples together as it does alone.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    verdict: Verdict


def built_weights(recipe: Recipe, workload: Workload) -> Weights:
    """Read or draw the weights of the source, and try them on a few examples.

    Args:
        recipe: the run.
        workload: from `prepare`.

    Raises:
        ModelError: they cannot be read, or the model cannot compute an example.
    """
    net = loading.build(recipe.model, sources.restored(workload.config), recipe.seed)
    return Weights(sources.weights(net), examined(net, workload.train))


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
        config = sources.restored(workload.config)
        self._shape = model_shape(sources.skeleton(recipe.model, config), recipe)
        weights = weights or built_weights(recipe, workload)
        self._shape = judged(self._shape, weights.verdict, recipe)
        net = self._assembled(weights) or self._build()
        choose_attention(net, self._device)
        modules = list(self._shape.modules)
        self._model = AdaptedModel(net, recipe.adapter, device, self._shape.obstacle, modules)
        self._language = recipe.model.task == LANGUAGE_TASK
        if not self._language:
            two = workload.train.rows(np.arange(min(2, len(workload.train))))
            read_first_token_only(net, tensors(two, self._device)[0])
        self._drops = recipe.adapter.dropout > 0 or drops(net)
        self._drawing = Drawing(recipe, workload, drops=self._drops)
        self._passes = RecordedPasses(self._model, recording=self._recordable())
        self._testing = Testing(recipe, workload, self._model, self._passes)
        # The last optimiser, and what it is for.
        self._optimized: tuple[list[torch.Tensor], torch.optim.Optimizer | None] = [], None

    def _recordable(self) -> bool:
        """Return whether the operations of a pass follow from shapes alone: not with masks."""
        plain = self._recipe.runtime.precision == "fp32" and not self._drops
        return plain and [*self._workload.train.inputs] == [PIXELS] and self._device.type == "cpu"

    def _build(self) -> nn.Module:
        config = sources.restored(self._workload.config)
        return loading.build(self._recipe.model, config, self._recipe.seed)

    def _assembled(self, weights: Weights) -> nn.Module | None:
        config = sources.restored(self._workload.config)
        return sources.assembled(self._recipe.model, config, weights.arrays)

    def shape(self) -> ModelShape:
        """Return the model's sizes."""
        return self._shape

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the head's tensors, or in a full-model round all, as built from the seed."""
        return self._model.initial_tensors(trainable)

    def draw(self, clients: Sequence[int], plan: LocalPlan) -> list[GroupWork]:
        """Return the work of a block, by group of clients that are trained together.

        Raises:
            ClientError: a client's cannot be drawn; names the client and the round.
        """
        alone = plan.trainable == "full" or self._model.obstacle is not None
        groups = [[client] for client in clients] if alone else [clients]
        # Of a block that is read ahead there is one group.
        return [self._drawing.group(each, plan, ahead=len(groups) == 1) for each in groups]

    def train(
        self,
        clients: Sequence[int],
        starts: Sequence[AdapterState],
        base: Base,
        plan: LocalPlan,
        drawn: Any = None,
    ) -> Iterator[ClientUpdate]:
        """Train each client of a block from its state; yield one update a client, in that order.

        Args:
            clients: the block.
            starts: a state of each.
            base: what is frozen.
            plan: the round.
            drawn: what `draw` has returned for the same clients and plan; None: draw.

        Raises:
            ClientError: a client's training raised; names the client and the round.
            BlockMemoryError: the block does not fit into memory.
            RunError: each client can be trained alone, but not the block.
        """
        work = self.draw(clients, plan) if drawn is None else drawn
        yield from self._trained(work, dict(zip(clients, starts, strict=True)), base, plan)

    def _trained(
        self,
        work: Sequence[GroupWork],
        start_of: Mapping[int, AdapterState],
        base: Base,
        plan: LocalPlan,
    ) -> Iterator[ClientUpdate]:
        """Train one group, or one client after the other; yield in the order of `start_of`."""
        together = None
        if len(work[0].group.tasks) > 1:
            try:
                with memory_watched([*start_of]), self._taking_turns():
                    found = self._train_group(work[0], start_of, base, plan)
                yield from found
                return
            except BlockMemoryError:
                raise
            except Exception:
                # As text: the error itself would keep all that the block has made.
                together = traceback.format_exc()
            work = [self._drawing.group([client], plan, ahead=False) for client in start_of]
        for each in work:
            client = each.group.tasks[0].client
            with attributed(client, plan.round), memory_watched([client]), self._taking_turns():
                found = self._train_group(each, {client: start_of[client]}, base, plan)
            yield from found
        if together is not None:
            # Each of them can be trained alone: it is the block that fails.
            raise RunError(
                f"round {plan.round}: {len(start_of)} clients from {next(iter(start_of))} on cannot"
                f" be trained together; lower runtime.cohort_size\n{together}"
            )

    def _taking_turns(self) -> AbstractContextManager[object]:
        """Wait for other trainers of this process, where the model may draw."""
        return _DRAWING if self._drops else nullcontext()

    @python_lock.needed()
    def _train_group(
        self, work: GroupWork, start_of: Mapping[int, AdapterState], base: Base, plan: LocalPlan
    ) -> list[ClientUpdate]:
        """Train some clients in the same batches; the results are those of each one alone."""
        began = time.perf_counter()
        know_threads()
        self._passes.left = self._recipe.annealing.total_rounds / (plan.round + 1) - 1
        tasks = work.group.tasks
        starts = [start_of[task.client] for task in tasks]
        self._model.load(starts, base, plan.trainable, plan.frozen)
        # After loading. What draws outside of `ClientDropout` draws from torch's own state.
        _seed(work.seeds[0], self._device)
        self._model.train(True)
        trained: dict[int, Left] = {}
        with self._optimizer(plan) as optimizer:
            losses = self._steps(work, starts, trained, optimizer, plan)
        self._let_go(0, starts, trained)
        seconds = (time.perf_counter() - began) / len(tasks)
        numbers = [step.cpu().tolist() for step in losses]
        found = {
            task.client: update_of(task, trained[i], [n[i] for n in numbers if i < len(n)], seconds)
            for i, task in enumerate(tasks)
        }
        return [found[client] for client in start_of]

    def _steps(
        self,
        work: GroupWork,
        starts: Sequence[AdapterState],
        trained: dict[int, Left],
        optimizer: torch.optim.Optimizer | None,
        plan: LocalPlan,
    ) -> list[torch.Tensor]:
        """Take the steps of the loaded clients; return their losses by step, (clients,) each.

        Args:
            work: of the clients.
            starts: their states.
            trained: gets those who have done their steps before the last one.
            optimizer: of what is trained, if anything is.
            plan: the round.
        """
        settings, group, parameters = self._recipe.clients, work.group, self._model.trained
        dropout = ClientDropout(work.seeds, self._device) if self._drops else None
        received = [p.detach().clone() for p in parameters] if plan.proximal_weight > 0 else []
        losses: list[torch.Tensor] = []
        read = self._drawing.batches(work, self._device)
        for batch, (inputs, labels) in zip(group.batches, read, strict=True):
            if len(batch.examples) + len(trained) < len(starts):
                self._let_go(len(batch.examples), starts, trained)
                cut_to(optimizer, len(batch.examples))
            if dropout is not None:
                dropout.step(batch.examples)
            # What `optimizer.zero_grad` does, without its hooks: 0.2 ms a step.
            for parameter in parameters:
                parameter.grad = None
            weights = torch.from_numpy(batch.weights).to(self._device)
            with dropout or nullcontext():
                losses.append(self._pass(inputs, labels, weights, optimizer is not None))
            if optimizer is None:
                continue
            if received:
                add_proximal_gradient(parameters, received, plan.proximal_weight)
            if settings.max_grad_norm is not None:
                clip_by_client(parameters, settings.max_grad_norm, len(batch.examples))
            optimizer.step()
        return losses

    @contextmanager
    def _optimizer(self, plan: LocalPlan) -> Iterator[torch.optim.Optimizer | None]:
        """Give an optimiser of what is loaded that knows no gradient: the last one if that may be.

        Making one takes as long as a step of it. Its state is gone afterwards.
        """
        parameters, optimizer = self._optimized
        if parameters is not self._model.trained:
            optimizer = fresh_optimizer(self._model.trained, self._recipe.clients, plan.lr)
        for group in [] if optimizer is None else optimizer.param_groups:
            group["lr"] = plan.lr
        try:
            yield optimizer
        finally:
            if optimizer is not None:
                optimizer.state.clear()
            # Another one would keep tensors that nobody needs any more.
            self._optimized = (self._model.trained, optimizer) if self._model.kept else ([], None)

    def _let_go(
        self,
        staying: int,
        starts: Sequence[AdapterState],
        trained: dict[int, Left],
    ) -> None:
        """Read out the clients from place `staying` on that are still in the group."""
        leaving = range(staying, len(starts) - len(trained))
        states = self._model.read_from([starts[i] for i in leaving], staying)
        finite = all_finite(states.rows)
        trained |= {i: Left(states.state(i - staying), finite) for i in leaving}
        if staying > 0:
            self._model.keep(staying)

    def _pass(
        self,
        inputs: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        weights: torch.Tensor,
        backward: bool,
    ) -> torch.Tensor:
        """Compute the loss of each client on its part of a batch, and maybe all gradients.

        The graph ends with this: one that lived on would hold the next one to the present number
        of clients.
        """
        each = self._losses(inputs, labels, weights)
        if backward:
            python_lock.rarely_needed()
            each.sum().backward()  # type: ignore[no-untyped-call]
        return each.detach()

    def _losses(
        self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean loss of each client on its part of a batch."""
        bf16 = self._recipe.runtime.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            logits = self._passes.logits(inputs)
        if self._language:
            # A mean over the tokens of a client, not over its texts.
            each, tokens, _ = token_losses(logits.float(), inputs)
            own = weights > 0
            total = (each.view(weights.shape) * own).sum(dim=1)
            return total / (tokens.view(weights.shape) * own).sum(dim=1).clamp(min=1)
        each = functional.cross_entropy(logits.float(), labels, reduction="none")
        return (each.view(weights.shape) * weights).sum(dim=1)

    def evaluate(
        self, split: Split, rows: slice, state: AdapterState, base: Base, trainable: Trainable
    ) -> Predictions:
        """Return the predictions on some rows of a split, always in float32 arithmetic.

        The shards of a split are quickest where `state` is the same object in each call.
        """
        return self._testing.evaluate(split, rows, state, base, trainable)

    def test_clients(
        self,
        clients: Sequence[int],
        starts: Sequence[AdapterState],
        base: Base,
        trainable: Trainable,
    ) -> list[ClientScore]:
        """Return how each client's state does on the client's own held-out examples.

        Clients without any, or without a token to foretell in them, are left out. Clients of the
        same state are computed together.
        """
        return self._testing.test_clients(clients, starts, base, trainable)

    def export(self, state: AdapterState, base: Base, trainable: Trainable) -> dict[str, bytes]:
        """Return `adapter/...` and, where a user could not get the base elsewhere, `base/...`."""
        # Training is over.
        return_freed_memory()
        # peft is imported for this only: no client needs it.
        from rayfed_lora.models import export

        self._model.load([state], base, trainable)
        everything = self._model.tensors("full")
        return export.trained_files(
            self._recipe, self._workload.config, state, base, trainable, everything
        )


def _seed(seed: int, device: torch.device) -> None:
    """Seed torch's own state, where a forward pass on the device draws from it."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
