"""What training clients together owes each of them: the update that it would get alone.

The reference is a loop of plain torch on the plain model of transformers, one client at a time,
with W + scale * B A put in the place of each adapted weight W.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.data.client_table import ClientTable, batch_indices
from rayfed_lora.data.examples import Examples
from rayfed_lora.data.workload import Workload
from rayfed_lora.errors import ClientError
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.linear import sides
from rayfed_lora.models.shapes import adapted_modules, fusion_obstacle
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.tasks.engine import answer
from rayfed_lora.tasks.messages import Train
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel, LocalPlan
from tests.fakes import spoilt
from tests.tasks import Update, initial_tensors, train

CLASSES, WORDS, LONGEST = 3, 24, 9
# Client 0 has less than a batch of 5. Two passes are 2, 6, 4, 4 and 4 steps, and the last batch of
# a pass has 3, 2, 3, 5 and 2 examples.
SIZES = (3, 12, 8, 10, 7)
BLOCK = [2, 0, 1, 4]
WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    # Weights large enough for gradients far above the rounding.
    "initializer_range": 0.2,
}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 20}
SPECIAL = ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")
MODELS: dict[str, dict[str, Any]] = {
    "vit": {**WIDTHS, **CALM, "image_size": 8, "patch_size": 4, "num_channels": 1},
    "bert": {**WIDTHS, **CALM, **TEXT},
    # A head of two layers, and positions that are counted from the padding.
    "roberta": {**WIDTHS, **CALM, **TEXT, "pad_token_id": 1},
    # A head with a LayerNorm between linear layers.
    "modernbert": {**WIDTHS, **TEXT, **dict.fromkeys(SPECIAL, 0)},
    # Layers with transposed weights, and a head that reads a text's last token.
    "gpt2": {
        "vocab_size": WORDS,
        "n_positions": 20,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": 24,
        "initializer_range": 0.2,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(SPECIAL, 0),
    },
    # A Fourier transform over the tokens, padding among them.
    "fnet": {**WIDTHS, **TEXT, "hidden_dropout_prob": 0.0},
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
FUSED = ["vit", "bert", "roberta", "gpt2"]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0},
    "momentum": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"name": "adamw", "lr": 0.02, "weight_decay": 0.3},
}


def make_recipe(model: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> Recipe:
    """Two passes with momentum and weight decay, but for what is asked otherwise."""
    values = {"architecture": model, **MODELS[model], **(config or {})}
    kind = "image" if "image_size" in values else "text"
    clients: dict[str, Any] = {"per_round": 2, "batch_size": 5}
    if "clients__local_steps" not in overrides:
        clients["local_epochs"] = 2
    written = {
        "seed": 5,
        "data": {"partition": {"clients": len(SIZES)}},
        "model": {"task": f"{kind}-classification", "config": values},
        "annealing": {"heating": {"rank": 4}, "cooling": {"rank": 2}},
        "clients": {"optimizer": OPTIMIZERS["momentum"], **clients},
        "runtime": {"executor": "local", "device": "cpu"},
    }
    return load_recipe(written, {key.replace("__", "."): v for key, v in overrides.items()})


def plain_config(recipe: Recipe) -> Any:
    values = dict(recipe.model.config)
    return AutoConfig.for_model(values.pop("architecture"), num_labels=CLASSES, **values)


def plain_net(recipe: Recipe) -> nn.Module:
    is_image = recipe.model.task == "image-classification"
    auto = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(plain_config(recipe))


def texts(padding: int, shortest: int) -> dict[str, np.ndarray]:
    """Return texts of every length from `shortest` to the longest, in no order."""
    rng = np.random.default_rng(1)
    lengths = rng.permutation(np.arange(sum(SIZES)) % (LONGEST - shortest + 1)) + shortest
    mask = (np.arange(LONGEST) < lengths[:, None]).astype(np.int32)
    words = rng.integers(2, WORDS, mask.shape)
    ids = np.where(mask == 1, words, padding).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask}


def make_workload(recipe: Recipe, shortest: int = 2) -> Workload:
    config, rng = plain_config(recipe), np.random.default_rng(2)
    labels = rng.integers(0, CLASSES, sum(SIZES))
    if recipe.model.task == "image-classification":
        shape = (len(labels), 1, config.image_size, config.image_size)
        examples = Examples.of({"pixel_values": rng.normal(size=shape).astype(np.float32)}, labels)
    else:
        examples = Examples.of(texts(config.pad_token_id, shortest), labels)
    table = ClientTable(np.arange(len(labels)), np.cumsum([0, *SIZES]))
    names = tuple(str(i) for i in range(CLASSES))
    return Workload(examples, examples, examples, table, names, config.to_dict())


def inputs_of(examples: Examples, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return rows as tensors; texts stay padded as far as the longest of all clients is."""
    inputs = {name: torch.from_numpy(values[rows]) for name, values in examples.inputs.items()}
    return {name: t if t.is_floating_point() else t.long() for name, t in inputs.items()}


def random_factors(shape: Sequence[int], rank: int, scale: float, seed: int) -> Factors:
    """Return factors of a weight of this shape, none of them zero."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 0.3, (rank, shape[1])), rng.normal(0, 0.3, (shape[0], rank))
    return Factors(a.astype(np.float32), b.astype(np.float32), scale)


def received_state(trainer: LocalTrainer) -> AdapterState:
    modules = trainer.shape().modules.items()
    factors = {n: random_factors((s.d_out, s.d_in), 4, 1.5, i) for i, (n, s) in enumerate(modules)}
    return AdapterState(factors, initial_tensors(trainer, "adapter"))


def make_plan(recipe: Recipe, **values: Any) -> LocalPlan:
    lr = recipe.clients.optimizer.lr
    return replace(LocalPlan(1, "adapter", lr, proximal_weight=0.0), **values)


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
        update = f.scale * (tensors[f"{name}|b"] @ tensors[f"{name}|a"])
        # GPT-2's layers compute x W.
        weights[f"{name}.weight"] = plain[f"{name}.weight"] + (
            update.T if ".c_" in name else update
        )
    return weights


@dataclass(frozen=True)
class Reference:
    """What the plain loop gives one client; the norms are those of its gradients before a cut."""

    tensors: dict[str, np.ndarray]
    loss: float
    norms: list[float]


def plain_loop(
    recipe: Recipe,
    workload: Workload,
    initial: Mapping[str, np.ndarray],
    client: int,
    state: AdapterState,
    plan: LocalPlan,
) -> Reference:
    net, settings, chosen = plain_net(recipe).train(), recipe.clients, recipe.clients.optimizer
    plain = {name: torch.tensor(initial[name]) for name, _ in net.named_parameters()}
    tensors = {n: torch.tensor(v, requires_grad=True) for n, v in flat(state).items()}
    received = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    decay = {"lr": plan.lr, "weight_decay": chosen.weight_decay}
    if chosen.name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(tensors.values(), **decay)
    else:
        optimizer = torch.optim.SGD(tensors.values(), momentum=chosen.momentum, **decay)
    losses, norms = [], []
    for rows in batch_indices(
        workload.clients.examples(client),
        settings.batch_size,
        generator(recipe.seed, Purpose.BATCHES, plan.round, client),
        steps=settings.steps,
        epochs=settings.local_epochs,
    ):
        inputs = inputs_of(workload.train, rows)
        logits = functional_call(net, merged(plain, state, tensors), (), inputs).logits
        loss = functional.cross_entropy(logits, torch.from_numpy(workload.train.labels[rows]))
        losses.append(loss.item())
        away = sum(((t - received[name]) ** 2).sum() for name, t in tensors.items())
        optimizer.zero_grad()
        (loss + plan.proximal_weight / 2 * away).backward()
        norms.append(
            float(nn.utils.clip_grad_norm_(tensors.values(), settings.max_grad_norm or math.inf))
        )
        optimizer.step()
    trained = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return Reference(trained, float(np.mean(losses)), norms)


def assert_close(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], atol: float = 2e-6
) -> None:
    """Equal but for the rounding of float32: batched products add in another order."""
    assert set(one) == set(other)
    for name, tensor in one.items():
        np.testing.assert_allclose(tensor, other[name], rtol=1e-4, atol=atol, err_msg=name)


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(one[name] - other[name]).max(initial=0.0)) for name in one)


def trained_by(update: Update) -> dict[str, np.ndarray]:
    assert update.error is None
    assert update.state is not None
    return flat(update.state)


def block_of(
    trainer: LocalTrainer, clients: Sequence[int], state: AdapterState, plan: LocalPlan
) -> dict[int, Update]:
    updates = train(trainer, clients, state, plan)
    assert [update.client for update in updates] == list(clients)
    return {update.client: update for update in updates}


def each_alone(
    trainer: LocalTrainer, clients: Sequence[int], state: AdapterState, plan: LocalPlan
) -> dict[int, Update]:
    return {client: block_of(trainer, [client], state, plan)[client] for client in clients}


def check_block(recipe: Recipe, same_bits: bool = False, **values: Any) -> list[Reference]:
    """Compare the updates of a block with those of the plain loop and of blocks of one."""
    workload, plan = make_workload(recipe), make_plan(recipe, **values)
    trainer = LocalTrainer(recipe, workload)
    initial = initial_tensors(trainer, "full")
    state = AdapterState({}, initial) if plan.trainable == "full" else received_state(trainer)
    block, single = (of(trainer, BLOCK, state, plan) for of in (block_of, each_alone))
    found = {c: plain_loop(recipe, workload, initial, c, state, plan) for c in BLOCK}
    # Adam's step is no shorter where the gradient is next to nothing, and all of that one may be
    # rounding; 2e-5 is a thousandth of a step.
    atol = 2e-5 if recipe.clients.optimizer.name == "adamw" else 2e-6
    for client, reference in found.items():
        update, alone = block[client], single[client]
        assert update.examples == SIZES[client]
        assert_close(trained_by(update), reference.tensors, atol)
        assert_close(trained_by(update), trained_by(alone), atol)
        assert not same_bits or distance(trained_by(update), trained_by(alone)) == 0.0
        assert update.train_loss == pytest.approx(reference.loss, rel=1e-5)
        assert update.train_loss == pytest.approx(alone.train_loss, rel=1e-5)
        # There is something to mistake: each moves, each elsewhere, by far more than rounding.
        assert distance(reference.tensors, flat(state)) > 0.005
        others = [other.tensors for c, other in found.items() if c != client]
        assert min(distance(reference.tensors, other) for other in others) > 0.005
    return list(found.values())


@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", FUSED)
def test_clients_of_different_numbers_of_steps_train_together_as_each_would_alone(
    model: str, optimizer: str, targets: str, head: bool
) -> None:
    # Who has finished while others go on is not moved by momentum, decay or Adam's state.
    adapter = {"adapter__target_modules": targets, "adapter__train_head": head}
    check_block(make_recipe(model, clients__optimizer=OPTIMIZERS[optimizer], **adapter))


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_clients_of_many_rows_for_a_layer_train_together_as_each_would_alone(
    optimizer: str, targets: str
) -> None:
    # 17 tokens an image, two layers: the first layer's factors are merged into its weights.
    longer = {"patch_size": 2, "num_hidden_layers": 2}
    chosen = {"clients__optimizer": OPTIMIZERS[optimizer], "adapter__target_modules": targets}
    check_block(make_recipe("vit", longer, **chosen))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", FUSED)
def test_clients_of_as_many_steps_but_smaller_batches_train_together_as_alone(
    model: str, optimizer: str
) -> None:
    chosen = {"clients__optimizer": OPTIMIZERS[optimizer], "clients__local_steps": 4}
    check_block(make_recipe(model, **chosen))


@pytest.mark.parametrize("model", FUSED)
def test_the_proximal_term_pulls_each_client_of_a_block_by_itself(model: str) -> None:
    check_block(make_recipe(model), proximal_weight=2.0)


@pytest.mark.parametrize("mu", [0.0, 2.0])
@pytest.mark.parametrize(("model", "limit"), [("vit", 2.5), ("bert", 1.6), ("roberta", 1.6)])
def test_gradients_are_cut_client_by_client(model: str, limit: float, mu: float) -> None:
    recipe = make_recipe(model, clients__max_grad_norm=limit)
    references = check_block(recipe, proximal_weight=mu)
    # The limit bites for some clients and never for others.
    assert {max(reference.norms) > limit for reference in references} == {True, False}


DROPPING: dict[str, tuple[float, dict[str, Any]]] = {
    "adapter": (0.3, {}),
    "hidden": (0.0, {"hidden_dropout_prob": 0.1}),
    "attention": (0.0, {"attention_probs_dropout_prob": 0.3}),
    "all": (0.3, {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}),
}


@pytest.mark.parametrize(
    ("model", "where"),
    [*(("vit", where) for where in DROPPING), *(("bert", where) for where in DROPPING)],
)
def test_a_client_draws_the_same_dropout_in_a_block_as_alone(model: str, where: str) -> None:
    share, config = DROPPING[where]
    dropping, calm = make_recipe(model, config, adapter__dropout=share), make_recipe(model)
    trainer, undropped = (
        LocalTrainer(recipe, make_workload(recipe, shortest=LONGEST)) for recipe in (dropping, calm)
    )
    state, plan = received_state(trainer), make_plan(calm)
    block, single = (of(trainer, BLOCK, state, plan) for of in (block_of, each_alone))
    without = block_of(undropped, BLOCK, state, plan)
    for client in BLOCK:
        assert_close(trained_by(block[client]), trained_by(single[client]))
        assert distance(trained_by(block[client]), trained_by(without[client])) > 0.005


def test_a_spoilt_example_of_one_client_changes_no_bit_of_the_others() -> None:
    recipe = make_recipe("vit", clients__max_grad_norm=2.5)
    clean = make_workload(recipe)
    place = (clean.clients.examples(1)[3], 0, 2, 2)
    wrong = replace(clean, train=spoilt(clean.train, "pixel_values", place, np.nan))
    trainer, plan = LocalTrainer(recipe, wrong), make_plan(recipe)
    state = received_state(trainer)
    block = block_of(trainer, BLOCK, state, plan)
    expected = block_of(LocalTrainer(recipe, clean), BLOCK, state, plan)
    # The spoilt example is in one of the three steps of the first pass.
    assert block[1].state is None
    assert block[1].error in {f"loss is nan in local step {i} of 6" for i in (1, 2, 3)}
    for client in {*BLOCK} - {1}:
        assert distance(trained_by(block[client]), trained_by(expected[client])) == 0.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("model", FUSED)
def test_bf16_in_a_block_is_that_of_the_client_alone(model: str, dropout: float) -> None:
    rounded, exact = (
        make_recipe(model, adapter__dropout=dropout, runtime__precision=precision)
        for precision in ("bf16", "fp32")
    )
    workload, plan = make_workload(rounded, shortest=LONGEST), make_plan(rounded)
    trainer = LocalTrainer(rounded, workload)
    state = received_state(trainer)
    block, single = (of(trainer, BLOCK, state, plan) for of in (block_of, each_alone))
    floats = block_of(LocalTrainer(exact, workload), BLOCK, state, plan)
    for client in BLOCK:
        update = trained_by(block[client])
        moved = distance(update, flat(state))
        # bfloat16 has 8 bits: products differ by 2**-9, and so do the steps that follow.
        assert distance(update, trained_by(single[client])) < 0.02 * moved
        assert 0 < distance(update, trained_by(floats[client])) < 0.1 * moved


@pytest.mark.parametrize("model", FUSED)
def test_clients_of_a_full_model_round_train_one_after_the_other(model: str) -> None:
    check_block(make_recipe(model), same_bits=True, trainable="full")


OBSTACLES = {
    "mobilevit": r"mobilevit\.\S+ \(BatchNorm2d\) normalises over the examples of a batch",
    "modernbert": r"the head's head\.norm is LayerNorm, not nn\.Linear",
}


@pytest.mark.parametrize("model", OBSTACLES)
def test_where_clients_would_meet_they_train_one_after_the_other(model: str) -> None:
    recipe = make_recipe(model, adapter__target_modules="all-linear", clients__local_steps=1)
    net, trainer = plain_net(recipe), LocalTrainer(recipe, make_workload(recipe))
    assert re.fullmatch(OBSTACLES[model], fusion_obstacle(net, recipe.adapter) or "")
    assert re.fullmatch(OBSTACLES[model], trainer.shape().obstacle or "")
    with pytest.raises(ValueError, match=OBSTACLES[model]):
        AdaptedModel(net, recipe.adapter).load([received_state(trainer)] * 2, Base(), "adapter")
    check_block(recipe, same_bits=True)


def test_clients_of_a_model_that_mixes_padding_in_train_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe("fnet", adapter__target_modules="all-linear")
    workload, plan = make_workload(recipe), make_plan(recipe)
    trainer = LocalTrainer(recipe, workload)
    reason = "the model mixes padding into its result: without it, a text has other logits"
    assert trainer.shape().obstacle == reason
    assert trainer.shape().notes == (
        f"evaluation.batch_size may change the results of evaluations: {reason}",
    )
    # Nothing in its layers tells.
    assert fusion_obstacle(plain_net(recipe), recipe.adapter) is None
    state = received_state(trainer)
    block, single = (of(trainer, BLOCK, state, plan) for of in (block_of, each_alone))
    monkeypatch.setattr("rayfed_lora.training.trainer.judged", lambda shape, *_: shape)
    wrong = block_of(LocalTrainer(recipe, workload), BLOCK, state, plan)
    for client in BLOCK:
        alone = trained_by(single[client])
        assert distance(trained_by(block[client]), alone) == 0.0
        # Of the longest client only, the texts are as long as alone.
        away = distance(trained_by(wrong[client]), alone)
        longest = max(
            workload.train.inputs["attention_mask"][workload.clients.examples(client)].sum(1)
        )
        assert away > 0.005 or longest == LONGEST


def test_a_head_that_cannot_be_copied_is_no_obstacle_where_it_is_not_trained() -> None:
    adapter = {"adapter__target_modules": "all-linear", "adapter__train_head": False}
    recipe = make_recipe("modernbert", **adapter)
    assert fusion_obstacle(plain_net(recipe), recipe.adapter) is None
    check_block(recipe)


@pytest.mark.parametrize("model", ["vit", "bert"])
def test_a_client_that_raises_is_named_and_the_others_are_as_alone(model: str) -> None:
    recipe = make_recipe(model)
    workload = make_workload(recipe)
    labels = spoilt(workload.train, "labels", workload.clients.examples(1), CLASSES + 4)
    wrong = replace(workload, train=labels)
    trainer, unharmed = LocalTrainer(recipe, wrong), LocalTrainer(recipe, workload)
    state, plan = received_state(trainer), make_plan(recipe, round=6)
    with pytest.raises(ClientError, match="client 1 failed in round 7") as raised:
        train(trainer, BLOCK, state, plan)
    assert (raised.value.client, raised.value.round_index) == (1, 6)
    assert "Target 7 is out of bounds" in raised.value.trace
    # The trainer can go on: nothing of the failed block is left in it.
    after = block_of(trainer, [4, 2, 0], state, plan)
    expected = each_alone(unharmed, [2, 0, 4], state, plan)
    # A tolerant round goes on without the client.
    tolerated = block_of(trainer, BLOCK, state, replace(plan, tolerant=True))
    assert tolerated[1].state is None
    assert "Target 7 is out of bounds" in (tolerated[1].trace or "")
    for client in (2, 0, 4):
        assert_close(trained_by(after[client]), trained_by(expected[client]))
        assert_close(trained_by(tolerated[client]), trained_by(expected[client]))


@pytest.mark.parametrize("model", FUSED)
def test_clients_of_limited_ranks_train_together_as_each_would_from_its_cut_state(
    model: str,
) -> None:
    recipe = make_recipe(model, adapter__target_modules="all-linear")
    trainer, plan = LocalTrainer(recipe, make_workload(recipe)), make_plan(recipe)
    # Client 0 has the fewest steps: it leaves first, alone; 1, with the most, stays to the end.
    state, limits = received_state(trainer), {0: 2, 1: 1, 4: 3}
    found = train(trainer, BLOCK, state, plan, limits=limits)
    for client, update in zip(BLOCK, found, strict=True):
        rank = limits.get(client, 4)
        factors = {n: replace(f, a=f.a[:rank], b=f.b[:, :rank]) for n, f in state.factors.items()}
        cut = replace(state, factors=factors)
        (alone,) = train(trainer, [client], cut, plan)
        assert {f.rank for f in update.state.factors.values()} == {rank}
        assert_close(trained_by(update), trained_by(alone))
        assert distance(trained_by(alone), flat(cut)) > 0.005


def test_clients_with_factors_b_of_their_own_train_together_as_each_would_alone() -> None:
    recipe = make_recipe("vit")
    trainer, plan = LocalTrainer(recipe, make_workload(recipe)), make_plan(recipe)
    state = received_state(trainer)
    own = {n: f.b + np.float32(0.2) for n, f in state.factors.items()}
    found = train(trainer, BLOCK, state, plan, personal={0: own})
    changed = {n: replace(f, b=own[n]) for n, f in state.factors.items()}
    for client, update in zip(BLOCK, found, strict=True):
        start = replace(state, factors=changed) if client == 0 else state
        (alone,) = train(trainer, [client], start, plan)
        assert_close(trained_by(update), trained_by(alone))


@pytest.mark.parametrize("rule", ["factor-average", "product-svd", "zero-pad", "share-a"])
def test_a_block_sends_the_means_of_its_usable_clients(rule: str) -> None:
    recipe = make_recipe("vit")
    clean = make_workload(recipe)
    place = (clean.clients.examples(1)[3], 0, 2, 2)
    wrong = replace(clean, train=spoilt(clean.train, "pixel_values", place, np.nan))
    trainer, plan = LocalTrainer(recipe, wrong), make_plan(recipe)
    state = received_state(trainer)
    if RULES[rule].personal:
        # Of a client that has no B yet, B is 0.
        zero = {n: replace(f, b=np.zeros_like(f.b)) for n, f in state.factors.items()}
        state = replace(state, factors=zero)
    model = GlobalModel(state, Base(), "adapter")
    found = trainer.run(Train(model, plan, rule, (tuple(BLOCK),)))
    expected = RULES[rule].means()
    for update in train(trainer, BLOCK, state, plan):
        if update.state is not None:
            expected.add(update.examples, update.state)
    assert [report.usable for report in found.reports] == [True, True, False, True]
    assert [report.personal is not None for report in found.reports] == [
        RULES[rule].personal and report.usable for report in found.reports
    ]
    for name, tensor in expected.tensors().items():
        np.testing.assert_array_equal(found.means.tensors()[name], tensor)
    for name in state.factors:
        (b, a), (wanted_b, wanted_a) = found.means.product(name), expected.product(name)
        np.testing.assert_allclose(b @ a, wanted_b @ wanted_a, rtol=1e-4, atol=1e-6)


def test_halves_of_a_block_are_joined_to_the_reports_and_means_of_the_whole() -> None:
    recipe = make_recipe("vit")
    trainer, plan = LocalTrainer(recipe, make_workload(recipe)), make_plan(recipe)
    state = received_state(trainer)
    task = Train(GlobalModel(state, Base(), "adapter"), plan, "product-svd", (tuple(BLOCK),))
    whole, halved = trainer.run(task), answer(trainer, task, halvings=1)
    assert [r.client for r in halved.reports] == [r.client for r in whole.reports] == BLOCK
    # Its actor was lost, of which the user was told.
    assert halved.reports[0].note is None
    for name in state.factors:
        (b, a), (wanted_b, wanted_a) = halved.means.product(name), whole.means.product(name)
        np.testing.assert_allclose(b @ a, wanted_b @ wanted_a, rtol=1e-4, atol=1e-6)


# Clients of the rank and scale, each with as many examples.
MIXED, EACH = ((0, 1.5), (1, 0.5), (3, 2.0)), 4


def out_and_in(net: nn.Module, name: str) -> tuple[int, int]:
    shape = sides(net.get_submodule(name))
    return shape.d_out, shape.d_in


def mixed_states(net: nn.Module, modules: list[str]) -> list[AdapterState]:
    """Return a state a client, each with a head of its own; every other module has a rank less."""
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    states = []
    for rank, scale in MIXED:
        ranks = {name: max(rank - i % 2, 0) for i, name in enumerate(modules)}
        rng = np.random.default_rng(rank)
        dense = {
            name: rng.normal(0, 0.3, shape).astype(np.float32)
            for name, shape in shapes.items()
            if name.startswith(("classifier.", "score."))
        }
        factors = {
            name: random_factors(out_and_in(net, name), r, scale, rank) for name, r in ranks.items()
        }
        states.append(AdapterState(factors, dense))
    return states


def stepped(
    model: AdaptedModel, states: list[AdapterState], inputs: Any, labels: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Load states and take three steps; return the first logits and the trained tensors."""
    model.load(states, Base(), "adapter")
    parameters = model.parameters(states[-1])
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9, weight_decay=0.1)
    seen = []
    for _ in range(3):
        seen.append(model.net(**inputs).logits)
        optimizer.zero_grad()
        (functional.cross_entropy(seen[-1], labels, reduction="sum") / EACH).backward()
        optimizer.step()
    return seen[0].detach(), parameters


@pytest.mark.parametrize("model", FUSED)
def test_clients_of_different_ranks_and_scales_compute_and_train_in_one_group(model: str) -> None:
    recipe = make_recipe(model, adapter__target_modules="all-linear")
    examples, rows = make_workload(recipe).train, np.arange(EACH * len(MIXED))
    net = plain_net(recipe).eval()
    plain = {name: parameter.detach() for name, parameter in net.named_parameters()}
    states = mixed_states(net, adapted_modules(net, recipe.adapter))
    labels = torch.tensor(examples.labels)
    group, lone = (AdaptedModel(plain_net(recipe).eval(), recipe.adapter) for _ in range(2))
    logits, parameters = stepped(group, states, inputs_of(examples, rows), labels[rows])
    for i, state in enumerate(states):
        own = rows[i * EACH : (i + 1) * EACH]
        inputs, tensors = inputs_of(examples, own), flat(state)
        weights = merged(plain, state, {n: torch.from_numpy(v) for n, v in tensors.items()})
        with torch.no_grad():
            expected = functional_call(net, weights, (), inputs).logits
        alone, _ = stepped(lone, [state], inputs, labels[own])
        np.testing.assert_allclose(logits[own], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits[own], alone, rtol=1e-4, atol=1e-5)
        (read,), (own_read,) = group.read_from([state], i), lone.read_from([state], 0)
        assert_close(flat(read), flat(own_read))
        assert distance(flat(read), tensors) > 0.005
        for name, f in state.factors.items():
            assert (read.factors[name].rank, read.factors[name].scale) == (f.rank, f.scale)
            # Behind a client's own rank the group's factors are as empty as they were.
            assert not parameters[f"{name}.lora_A"][i, f.rank :].any()
            assert not parameters[f"{name}.lora_B"][i, :, f.rank :].any()
