"""A loaded model's predictions, losses and scores."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from rayfed_lora.data.examples import Batch
from rayfed_lora.data.workload import Workload
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.language import LanguageLoss
from rayfed_lora.models.recorded import RecordedPasses
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.messages import Evaluate, TestClients
from rayfed_lora.tasks.training import Starts
from rayfed_lora.training.device import memory_watched
from rayfed_lora.training.drawing import tensors
from rayfed_lora.types import ClientScore, Predictions

# With more classes, probabilities would take too long to send.
_MOST_CLASSES = 200


class Evaluator:
    """Tests states on the model that a trainer trains too, always in float32 arithmetic."""

    def __init__(
        self,
        recipe: Recipe,
        workload: Workload,
        model: AdaptedModel,
        passes: RecordedPasses,
        language: LanguageLoss | None,
    ) -> None:
        """Test on a model, loaded for each test.

        Args:
            recipe: the run.
            workload: its data.
            model: with the trainer.
            passes: compute it.
            language: the loss of a language model; None: a classifier.
        """
        self._recipe, self._workload = recipe, workload
        self._model, self._passes, self._language = model, passes, language

    @torch.no_grad()
    def evaluate(self, task: Evaluate) -> list[Predictions]:
        """Return the predictions on some shards of a split, one after the other."""
        held = self._workload.test if task.split == "test" else self._workload.validation
        found = []
        for rows in task.shards:
            self._model.show(task.model)
            self._model.train(False)
            chosen = np.arange(len(held))[rows]
            with memory_watched(
                f"{len(chosen)} examples of the {task.split} split do not fit into memory"
            ):
                found.append(self.predictions(held.rows(chosen)))
        return found

    def predictions(self, examples: Batch) -> Predictions:
        """Return the predictions of the loaded model, in evaluation mode."""
        know_threads()
        if self._language is not None:
            return self._of_texts(examples, self._language)
        inputs, labels = tensors(examples, self._model.device)
        logits = self._passes.logits(inputs).float()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        classes = logits.argmax(dim=1)
        few = logits.shape[1] <= _MOST_CLASSES
        return Predictions(
            labels=examples.labels,
            losses=losses.cpu().numpy(),
            correct=(classes == labels).long().cpu().numpy(),
            predicted=np.ones(len(examples.labels), np.int64),
            classes=classes.cpu().numpy(),
            probabilities=logits.softmax(dim=1).cpu().numpy() if few else None,
        )

    def _of_texts(self, examples: Batch, loss: LanguageLoss) -> Predictions:
        """Return the predictions of a language model: as many texts at once as it may take."""
        inputs, _ = tensors(examples)
        texts, length = inputs["input_ids"].shape
        size = loss.most_texts(length, self._model.device)
        parts = []
        for low in range(0, texts, size):
            part = {name: x[low : low + size].to(self._model.device) for name, x in inputs.items()}
            found = loss(part, scored=True)
            parts.append([each.cpu().numpy() for each in found if each is not None])
        losses, tokens, right = (np.concatenate(each) for each in zip(*parts, strict=True))
        none = np.full(texts, -1)
        return Predictions(none, losses, right, tokens, none)

    @torch.no_grad()
    def test_clients(self, task: TestClients) -> tuple[ClientScore, ...]:
        """Return the scores of each client's state on the client's own held-out examples.

        Clients without any, or without a token to predict in them, are left out. Clients of the
        same state are computed together.
        """
        table = self._workload.held_out
        if table is None:
            return ()
        starts = Starts(task)
        found: dict[int, ClientScore] = {}
        mine = [(k, starts.of(k)) for k in task.clients if table.counts[k] > 0]
        states = {state.version: state for _, state in mine}
        self._model.train(False)
        for version, state in states.items():
            group = [client for client, own in mine if own.version == version]
            self._model.load([state], task.model.base, task.model.trainable)
            rows = np.concatenate([table.examples(client) for client in group])
            size = self._recipe.evaluation.batch_size
            with memory_watched(
                f"{len(rows)} examples of {len(group)} clients do not fit into memory"
            ):
                parts = [
                    self.predictions(self._workload.train.rows(rows[i : i + size]))
                    for i in range(0, len(rows), size)
                ]
            losses = np.concatenate([part.losses for part in parts]).astype(np.float64)
            right = np.concatenate([part.correct for part in parts])
            count = np.concatenate([part.predicted for part in parts])
            edges = np.cumsum([0, *(table.counts[client] for client in group)])
            for client, low, high in zip(group, edges, edges[1:], strict=False):
                predicted = int(count[low:high].sum())
                if predicted == 0:
                    continue
                loss = float(losses[low:high].sum()) / predicted
                accuracy = int(right[low:high].sum()) / predicted
                found[client] = ClientScore(client, int(high - low), accuracy, loss)
        return tuple(found[client] for client, _ in mine if client in found)


def know_threads() -> None:
    """Let torch read the number of threads of this thread: else the first products use all."""
    torch.get_num_threads()
