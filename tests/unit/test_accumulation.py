"""Micro-batches: their gradients add up to that of one batch, for each client of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayfed_lora.data.examples import COUNTED
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.drawing import tensors
from rayfed_lora.training.dropout import ClientDropout
from rayfed_lora.training.groups import ClientTask, GroupBatch
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Base, Factors, LocalPlan
from tests.fakes import make_recipe
from tests.unit.test_checkpointing import language
from tests.unit.test_language_models import texts  # noqa: F401 - a fixture

VIT: dict[str, Any] = {
    "data__source": "digits",
    "model__config": {
        "architecture": "vit",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
    },
    "annealing__initiating__rounds": 0,
}
# Rows of three clients in one step: 7, 4 and 1 of them.
ROWS = [np.array([0, 3, 5, 8, 9, 11, 12]), np.array([1, 2, 4, 6]), np.array([7])]


def recipe_of(kind: str, folder: Path, **values: Any) -> Recipe:
    return make_recipe(**VIT, **values) if kind == "vit" else language(folder, kind, **values)


def gradients(
    recipe: Recipe, rows: list[np.ndarray], *, drops: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the gradients of a step, and the loss of each client."""
    trainer = LocalTrainer(recipe, prepare(recipe))
    draw = np.random.default_rng(1)
    factors = {
        name: Factors(
            draw.normal(0, 0.3, (2, m.d_in)).astype(np.float32),
            draw.normal(0, 0.3, (m.d_out, 2)).astype(np.float32),
            1.0,
        )
        for name, m in trainer.shape().modules.items()
    }
    model = trainer._model
    states = [AdapterState(factors, model.initial_tensors("adapter")) for _ in rows]
    model.load(states, Base(), "adapter")
    model.train(True)
    batch = GroupBatch.of(rows)
    examples = trainer._workload.train.rows(batch.indices)
    read = tensors(examples)
    if recipe.model.task == "causal-lm":
        # All but the first two tokens count: texts have different numbers of them.
        shape = read[0]["input_ids"].shape
        counted = (torch.arange(shape[1]) > 1).expand(shape)
        read = ({**read[0], COUNTED: counted}, read[1])
    dropout = ClientDropout(range(len(rows)), torch.device("cpu")) if drops else None
    cross_entropy = torch.nn.functional.cross_entropy
    losses = trainer._gradients.add(
        batch,
        read,
        lambda logits, labels: cross_entropy(logits, labels, reduction="none"),
        dropout,
        learns=True,
    )
    found = [p.grad for p in model.trained if p.grad is not None]
    assert len(found) == len(model.trained)
    return found, losses


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_micro_batches_add_up_to_one_batch_for_each_client_of_a_block(
    texts: Path,  # noqa: F811
    kind: str,
) -> None:
    """8 examples at once, and 4 micro-batches of 2; by tokens in texts of different lengths."""
    own = {"adapter__dropout": 0.0}
    own |= {"model__config__attention_dropout": 0.0} if kind == "llama" else {}
    whole, expected = gradients(recipe_of(kind, texts, clients__batch_size=8, **own), ROWS)
    parts = recipe_of(kind, texts, clients__batch_size=2, clients__accumulate=4, **own)
    found, losses = gradients(parts, ROWS)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, whole, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_client_drops_the_same_alone_and_beside_clients_of_more_micro_batches(
    texts: Path,  # noqa: F811
) -> None:
    """All texts of these rows are cut to the same length, so that draws are alike."""
    recipe = language(
        texts,
        "gpt2",
        clients__batch_size=2,
        clients__accumulate=4,
        data__max_length=3,
    )
    together, losses = gradients(recipe, ROWS, drops=True)
    alone, loss = gradients(recipe, ROWS[:1], drops=True)
    assert loss.item() > 1.0
    torch.testing.assert_close(losses[:1], loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[:1], other, rtol=1e-4, atol=1e-6)


def test_a_step_takes_as_many_examples_as_its_micro_batches_hold(texts: Path) -> None:  # noqa: F811
    recipe = language(texts, "llama", clients__batch_size=2, clients__accumulate=3)
    plan = LocalPlan(1, "adapter", 0.1, 0.0)
    task = ClientTask.of(0, np.arange(20), recipe.clients, 1, plan)
    assert [len(batch) for batch in task.batches] == [6, 6, 6]
    few = ClientTask.of(0, np.arange(5), recipe.clients, 1, plan)
    assert [len(batch) for batch in few.batches] == [5, 5, 5]
