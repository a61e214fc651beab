"""What training clients together owes each of them: the update that it would get alone.

The reference is a loop of plain torch on the plain model of transformers, one client at a time,
with W + scale * B A put in the place of each adapted weight W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from rayfed_lora.data.batches import batch_indices
from rayfed_lora.data.examples import Examples
from rayfed_lora.data.partition import ClientTable
from rayfed_lora.errors import ClientError
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.shapes import adapted_modules, fusion_obstacle
from rayfed_lora.recipe import Adapter, Recipe
from rayfed_lora.recipe_loading import load_recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.training.workload import Workload
from rayfed_lora.types import AdapterState, Base, ClientUpdate, Factors, LocalPlan

CLASSES, WORDS, LONGEST = 3, 24, 9
# Examples of clients 0 to 4, in batches of 5: the first has fewer than a batch, and in epochs
# they take 1, 3, 2, 2 and 2 steps, the last one of 2, 3, 5 and 2 examples.
SIZES, BATCH = (3, 12, 8, 10, 7), 5
BLOCK = [2, 0, 1, 4]
WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 20}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {**WIDTHS, **CALM, **IMAGE},
    "bert": {**WIDTHS, **CALM, **TEXT},
    # A head of two layers, and positions that are counted from the padding.
    "roberta": {**WIDTHS, **CALM, **TEXT, "pad_token_id": 1},
    # A head with a LayerNorm in it, on both sides of which there are linear layers.
    "modernbert": {
        **WIDTHS,
        **TEXT,
        **dict.fromkeys(["pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id"], 0),
        "sep_token_id": 0,
    },
    # Normalises over the batch.
    "mobilevit": {
        "image_size": 32,
        "num_channels": 1,
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [8] * 7,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
        "classifier_dropout_prob": 0.0,
    },
}
FUSED = ["vit", "bert", "roberta"]


@dataclass(frozen=True)
class Chosen:
    """An optimiser in a recipe's words and in torch's."""

    recipe: Mapping[str, Any]
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
    lr: float = 0.1


OPTIMIZERS = {
    "sgd": Chosen({"name": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": Chosen(
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "adamw": Chosen(
        {"name": "adamw", "weight_decay": 0.3},
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
        lr=0.02,
    ),
}
EPOCHS: dict[str, Any] = {"clients__local_epochs": 2}


def make_recipe(model: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> Recipe:
    values = {"architecture": model, **MODELS[model], **(config or {})}
    kind = "image" if "image_size" in values else "text"
    written = {
        "seed": 5,
        "data": {"partition": {"clients": len(SIZES)}},
        "model": {"task": f"{kind}-classification", "config": values},
        "annealing": {"heating": {"rank": 4}, "cooling": {"rank": 2}},
        "clients": {"per_round": 2, "batch_size": BATCH},
        "runtime": {"executor": "local", "device": "cpu"},
    }
    return load_recipe(written, {key.replace("__", "."): v for key, v in overrides.items()})


def plain_config(recipe: Recipe) -> Any:
    values = dict(recipe.model.config)
    return AutoConfig.for_model(values.pop("architecture"), num_labels=CLASSES, **values)


def images(size: int) -> dict[str, np.ndarray]:
    shape = (sum(SIZES), 1, size, size)
    return {"pixel_values": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def texts(padding: int, shortest: int) -> dict[str, np.ndarray]:
    """Return texts of every length from `shortest` to the longest, in no order."""
    rng = np.random.default_rng(1)
    lengths = rng.permutation(np.arange(sum(SIZES)) % (LONGEST - shortest + 1)) + shortest
    mask = (np.arange(LONGEST) < lengths[:, None]).astype(np.int32)
    words = rng.integers(2, WORDS, mask.shape)
    ids = np.where(mask == 1, words, padding).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask}


def make_workload(recipe: Recipe, shortest: int = 2) -> Workload:
    config = plain_config(recipe)
    is_image = recipe.model.task == "image-classification"
    inputs = images(config.image_size) if is_image else texts(config.pad_token_id, shortest)
    examples = Examples(inputs, np.random.default_rng(2).integers(0, CLASSES, sum(SIZES)))
    table = ClientTable(np.arange(sum(SIZES)), np.cumsum([0, *SIZES]))
    names = tuple(str(i) for i in range(CLASSES))
    return Workload(examples, examples, examples, table, names, config.to_dict())


def random_factors(d_in: int, d_out: int, rank: int, rng: np.random.Generator) -> Factors:
    a = rng.normal(0, 0.3, (rank, d_in)).astype(np.float32)
    return Factors(a, rng.normal(0, 0.3, (d_out, rank)).astype(np.float32), 1.5)


def received_state(trainer: LocalTrainer) -> AdapterState:
    """Return random factors of rank 4, none of them zero, and the head as the model has it."""
    rng = np.random.default_rng(11)
    shapes = trainer.shape().modules
    factors = {n: random_factors(s.d_in, s.d_out, 4, rng) for n, s in shapes.items()}
    return AdapterState(factors, trainer.initial_tensors("adapter"))


def make_plan(chosen: Chosen = OPTIMIZERS["sgd"], **values: Any) -> LocalPlan:
    return replace(LocalPlan(1, "adapter", chosen.lr, proximal_weight=0.0), **values)


def flat(state: AdapterState) -> dict[str, np.ndarray]:
    found = {f"{name}|a": f.a for name, f in state.factors.items()}
    found |= {f"{name}|b": f.b for name, f in state.factors.items()}
    return {**found, **state.dense}


def merged(
    plain: Mapping[str, torch.Tensor], state: AdapterState, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a plain model's weights with W + scale * B A in the place of W, and the head."""
    weights = {**plain, **{name: tensors[name] for name in state.dense}}
    for name, f in state.factors.items():
        a, b = tensors[f"{name}|a"], tensors[f"{name}|b"]
        weights[f"{name}.weight"] = plain[f"{name}.weight"] + f.scale * (b @ a)
    return weights


@dataclass(frozen=True)
class Reference:
    """What the loop of plain torch gives one client."""

    tensors: dict[str, np.ndarray]
    loss: float
    norms: list[float]


class PlainLoop:
    """The plain model of transformers, and a loop over one client's batches."""

    def __init__(self, recipe: Recipe, workload: Workload, initial: Mapping[str, Any]) -> None:
        is_image = recipe.model.task == "image-classification"
        auto = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
        self._net = auto.from_config(plain_config(recipe)).train()
        self._weights = {name: torch.tensor(value) for name, value in initial.items()}
        assert set(self._weights) == {name for name, _ in self._net.named_parameters()}
        self._recipe, self._workload = recipe, workload

    def train(
        self, client: int, state: AdapterState, plan: LocalPlan, chosen: Chosen
    ) -> Reference:
        clients, train = self._recipe.clients, self._workload.train
        tensors = {n: torch.tensor(v, requires_grad=True) for n, v in flat(state).items()}
        received = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        optimizer = chosen.make(list(tensors.values()))
        losses, norms = [], []
        for rows in batch_indices(
            self._workload.clients.examples(client),
            clients.batch_size,
            generator(self._recipe.seed, Purpose.BATCHES, plan.round, client),
            steps=clients.steps,
            epochs=clients.local_epochs,
        ):
            # Texts stay padded as far as the longest of all clients is.
            inputs = {n: torch.from_numpy(values[rows]) for n, values in train.inputs.items()}
            inputs = {n: t if t.is_floating_point() else t.long() for n, t in inputs.items()}
            weights = merged(self._weights, state, tensors)
            logits = functional_call(self._net, weights, (), inputs).logits
            loss = functional.cross_entropy(logits, torch.from_numpy(train.labels[rows]))
            losses.append(loss.item())
            away = sum(((t - received[name]) ** 2).sum() for name, t in tensors.items())
            optimizer.zero_grad()
            (loss + plan.proximal_weight / 2 * away).backward()
            limit = math.inf if clients.max_grad_norm is None else clients.max_grad_norm
            norms.append(float(nn.utils.clip_grad_norm_(tensors.values(), limit)))
            optimizer.step()
        trained = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
        return Reference(trained, float(np.mean(losses)), norms)


def assert_close(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    """Equal but for the rounding of float32: batched products add in another order."""
    assert set(one) == set(other)
    for name, tensor in one.items():
        np.testing.assert_allclose(tensor, other[name], rtol=1e-4, atol=2e-6, err_msg=name)


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def trained_by(update: ClientUpdate) -> dict[str, np.ndarray]:
    assert update.error is None
    assert update.state is not None
    return flat(update.state)


def together(
    trainer: LocalTrainer, clients: Sequence[int], state: AdapterState, plan: LocalPlan
) -> dict[int, ClientUpdate]:
    updates = list(trainer.train(clients, state, Base(), plan))
    assert [update.client for update in updates] == list(clients)
    return {update.client: update for update in updates}


def alone(
    trainer: LocalTrainer, clients: Sequence[int], state: AdapterState, plan: LocalPlan
) -> dict[int, ClientUpdate]:
    return {c: next(iter(trainer.train([c], state, Base(), plan))) for c in clients}


def check_block(
    recipe: Recipe, chosen: Chosen, plan: LocalPlan, fused: bool = True
) -> list[Reference]:
    """Compare the updates of a block with those of the plain loop and of blocks of one."""
    workload = make_workload(recipe)
    trainer = LocalTrainer(recipe, workload)
    assert (trainer.shape().obstacle is None) == fused
    loop = PlainLoop(recipe, workload, trainer.initial_tensors("full"))
    state = received_state(trainer)
    block = together(trainer, BLOCK, state, plan)
    singles = alone(trainer, BLOCK, state, plan)
    references = {client: loop.train(client, state, plan, chosen) for client in BLOCK}
    for client, reference in references.items():
        update, single = block[client], singles[client]
        assert update.examples == SIZES[client]
        assert_close(trained_by(update), reference.tensors)
        assert_close(trained_by(update), trained_by(single))
        assert update.train_loss == pytest.approx(reference.loss, rel=1e-5)
        assert update.train_loss == pytest.approx(single.train_loss, rel=1e-5)
        # There is something to mistake: each moves, each elsewhere, by far more than rounding.
        assert distance(reference.tensors, flat(state)) > 0.005
        others = [r.tensors for c, r in references.items() if c != client]
        assert min(distance(reference.tensors, other) for other in others) > 0.005
    return list(references.values())


@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", FUSED)
def test_clients_of_different_numbers_of_steps_train_together_as_each_would_alone(
    model: str, optimizer: str, targets: str, head: bool
) -> None:
    # Two passes are 4, 2, 6 and 4 steps of ragged batches: some of the block have finished while
    # others go on, and no momentum, decay or state of Adam's may move them any more.
    chosen = OPTIMIZERS[optimizer]
    adapter = {"adapter__target_modules": targets, "adapter__train_head": head}
    recipe = make_recipe(model, clients__optimizer=chosen.recipe, **EPOCHS, **adapter)
    check_block(recipe, chosen, make_plan(chosen))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", FUSED)
def test_clients_of_as_many_steps_but_smaller_batches_train_together_as_alone(
    model: str, optimizer: str
) -> None:
    chosen = OPTIMIZERS[optimizer]
    recipe = make_recipe(model, clients__optimizer=chosen.recipe, clients__local_steps=4)
    check_block(recipe, chosen, make_plan(chosen))
