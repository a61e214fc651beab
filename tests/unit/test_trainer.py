"""Local training against plain torch and plain PEFT, and what must not depend on what else ran."""

from __future__ import annotations

import csv
import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rayfed_lora.data.client_table import ClientTable, batch_indices
from rayfed_lora.data.examples import Examples
from rayfed_lora.data.workload import Workload
from rayfed_lora.errors import ClientError
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.tasks.messages import TestClients, Train
from rayfed_lora.tasks.training import BlockUpdate
from rayfed_lora.training import drawing as drawing_module
from rayfed_lora.training.finished import all_finite
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import (
    AdapterState,
    Base,
    Factors,
    GlobalModel,
    Predictions,
)
from tests.fakes import spoilt
from tests.tasks import Update, initial_tensors, local_plan, predict, train

# PEFT asks transformers 5 for a property that it is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

CLASSES = 3
# Examples of clients 0 to 4; client 0 has fewer than any batch used here.
SIZES = (3, 12, 8, 10, 7)
HEAD = ("classifier.weight", "classifier.bias")
VIT = {
    "architecture": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
BERT = {
    "architecture": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 5,
    "data": {"partition": {"clients": len(SIZES)}},
    "model": {"config": VIT},
    "adapter": {"alpha": 8.0},
    "annealing": {"heating": {"rank": 4}, "cooling": {"rank": 2}},
    "clients": {"per_round": 2, "local_steps": 5, "batch_size": 5},
    "runtime": {"executor": "local", "device": "cpu"},
}
WORDS = ["how", "many", "who", "is", "where", "the", "dog", "cat", "moon", "far", "old"]


def make_recipe(**overrides: Any) -> Recipe:
    return load_recipe(RECIPE, {key.replace("__", "."): v for key, v in overrides.items()})


def images(rows: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(rows, 1, 8, 8)).astype(np.float32)
    return Examples.of({"pixel_values": pixels}, rng.integers(0, CLASSES, rows))


def image_workload(recipe: Recipe, train: Examples | None = None) -> Workload:
    rows = sum(SIZES)
    names = {i: str(i) for i in range(CLASSES)}
    values = {k: v for k, v in recipe.model.config.items() if k != "architecture"}
    config = AutoConfig.for_model("vit", num_labels=CLASSES, id2label=names, **values)
    return Workload(
        train=images(rows, seed=1) if train is None else train,
        validation=images(4, seed=2),
        test=images(23, seed=3),
        clients=ClientTable(np.arange(rows), np.cumsum([0, *SIZES])),
        label_names=tuple(names.values()),
        config=config.to_dict(),
    )


def image_trainer(recipe: Recipe, train: Examples | None = None) -> LocalTrainer:
    return LocalTrainer(recipe, image_workload(recipe, train))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of a few words and a table of questions of several lengths."""
    folder = tmp_path_factory.mktemp("questions")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(str(folder))
    rng = np.random.default_rng(0)
    with (folder / "questions.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "label"])
        for i in range(60):
            words = rng.choice(WORDS, size=1 + i % 6)
            table.writerow([" ".join(words), f"kind {rng.integers(CLASSES)}"])
    return folder


def text_recipe(folder: Path, **overrides: Any) -> Recipe:
    text = {"task": "text-classification", "tokenizer": str(folder), "config": BERT}
    keys = {
        "data.source": str(folder / "questions.csv"),
        "data.partition.kind": "iid",
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    return load_recipe({**RECIPE, "model": text}, keys)


def adapter_state(trainer: LocalTrainer, rank: int = 4, scale: float = 2.0) -> AdapterState:
    """Return random factors, none of them zero, and the head as the model has it."""
    rng = np.random.default_rng(11)
    factors = {
        name: Factors(
            rng.normal(0, 0.3, (rank, shape.d_in)).astype(np.float32),
            rng.normal(0, 0.3, (shape.d_out, rank)).astype(np.float32),
            scale,
        )
        for name, shape in trainer.shape().modules.items()
    }
    return AdapterState(factors, initial_tensors(trainer, "adapter"))


def plain_net(recipe: Recipe, workload: Workload) -> nn.Module:
    """Return a model of transformers with the weights that the recipe's trainers start from."""
    values = dict(workload.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    is_text = "input_ids" in workload.train.inputs
    kind = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    net = kind.from_config(config)
    tensors = initial_tensors(LocalTrainer(recipe, workload), "full")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.tensor(tensors[name]))
    return net


def peft_net(recipe: Recipe, workload: Workload, state: AdapterState) -> PeftModel:
    """Return a plain PEFT model with the state's factors and head in it."""
    ranks = {f.rank for f in state.factors.values()}
    scales = {f.scale for f in state.factors.values()}
    (rank,), (scale,) = ranks, scales
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=list(state.factors),
        modules_to_save=["classifier"],
    )
    net = get_peft_model(plain_net(recipe, workload), config)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in peft_weights(state).items():
            weights[name].copy_(torch.tensor(tensor))
    return net


def peft_weights(state: AdapterState) -> dict[str, np.ndarray]:
    """Return a state's arrays by the names that PEFT gives the trained parameters."""
    found = {}
    for name, f in state.factors.items():
        found[f"base_model.model.{name}.lora_A.default.weight"] = f.a
        found[f"base_model.model.{name}.lora_B.default.weight"] = f.b
    for name, tensor in state.dense.items():
        module, kind = name.rsplit(".", 1)
        found[f"base_model.model.{module}.modules_to_save.default.{kind}"] = tensor
    return found


def batches_of(recipe: Recipe, workload: Workload, client: int, round_index: int) -> list[Any]:
    """Return the row numbers of each step, from the stream that the method documents."""
    return batch_indices(
        workload.clients.examples(client),
        recipe.clients.batch_size,
        generator(recipe.seed, Purpose.BATCHES, round_index, client),
        steps=recipe.clients.steps,
        epochs=recipe.clients.local_epochs,
    )


def inputs_of(workload: Workload, rows: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return rows as tensors, padded as far as the whole table is."""
    inputs = {name: torch.tensor(values[rows]) for name, values in workload.train.inputs.items()}
    inputs = {n: t if t.is_floating_point() else t.long() for n, t in inputs.items()}
    return inputs, torch.tensor(workload.train.labels[rows])


def plain_loop(
    net: nn.Module,
    workload: Workload,
    batches: Sequence[np.ndarray],
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    mu: float = 0.0,
    longest_gradient: float = math.inf,
) -> dict[str, np.ndarray]:
    """Train with plain torch, the proximal term as a part of the loss; return what was trained."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    received = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = optimizer_of(list(trained.values()))
    net.train()
    for rows in batches:
        inputs, labels = inputs_of(workload, rows)
        distance = sum(((p - received[name]) ** 2).sum() for name, p in trained.items())
        loss = functional.cross_entropy(net(**inputs).logits, labels) + mu / 2 * distance
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in trained.values()))
        for p in trained.values():
            p.grad.mul_(min(1.0, longest_gradient / norm))
        optimizer.step()
    return {name: p.detach().numpy() for name, p in trained.items()}


def only(updates: Iterable[Update]) -> tuple[Update, AdapterState]:
    """Return the one update and its state."""
    (update,) = updates
    assert update.error is None
    assert update.state is not None
    return update, update.state


def arrays_of(state: AdapterState) -> Iterator[tuple[str, np.ndarray]]:
    for name, f in state.factors.items():
        yield f"{name}|a", f.a
        yield f"{name}|b", f.b
    yield from state.dense.items()


def largest_difference(one: AdapterState, other: AdapterState) -> float:
    pairs = zip(arrays_of(one), arrays_of(other), strict=True)
    return max((float(np.abs(a - b).max()) for (_, a), (_, b) in pairs if a.size), default=0.0)


def assert_same_bits(one: AdapterState | None, other: AdapterState | None) -> None:
    assert one is not None
    assert other is not None
    assert largest_difference(one, other) == 0.0


def assert_close(one: AdapterState | None, other: AdapterState | None) -> None:
    """Equal but for the rounding of float32: batched products add in another order."""
    assert one is not None
    assert other is not None
    assert list(one.factors) == list(other.factors)
    for (name, a), (_, b) in zip(arrays_of(one), arrays_of(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=name)


def assert_matches_peft(state: AdapterState, expected: dict[str, np.ndarray]) -> None:
    found = peft_weights(state)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


def sgd(lr: float = 0.1, **values: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **values)


def test_one_sgd_step_follows_the_chain_rule_on_the_merged_weights() -> None:
    recipe = make_recipe(clients__local_steps=1, clients__batch_size=100)
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer)
    update, stepped = only(train(trainer, [2], state, local_plan(lr=20.0)))
    # A batch larger than the client is all its examples; their order does not matter.
    pixels, labels = inputs_of(workload, workload.clients.examples(2))
    net = plain_net(recipe, workload).double()
    merged = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    with torch.no_grad():
        for name, f in state.factors.items():
            merged[f"{name}.weight"] += torch.tensor(
                f.scale * f.b.astype(float) @ f.a.astype(float)
            )
    logits = functional_call(net, merged, (pixels["pixel_values"].double(),)).logits
    loss = functional.cross_entropy(logits, labels)
    loss.backward()
    assert update.train_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, f in state.factors.items():
        # W' = W + s B A: dL/dA = s B^T dL/dW', dL/dB = s dL/dW' A^T.
        gradient = merged[f"{name}.weight"].grad.numpy()
        a, b = f.a.astype(float), f.b.astype(float)
        new_a, new_b = a - 20 * f.scale * b.T @ gradient, b - 20 * f.scale * gradient @ a.T
        assert np.abs(new_a - a).max() > 1e-3
        np.testing.assert_allclose(stepped.factors[name].a, new_a, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(stepped.factors[name].b, new_b, rtol=1e-4, atol=1e-6)
        assert stepped.factors[name].scale == f.scale
    for name in HEAD:
        expected = state.dense[name] - 20 * merged[name].grad.numpy()
        np.testing.assert_allclose(stepped.dense[name], expected, rtol=1e-4, atol=1e-6)


OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": ({"momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD),
    "adamw": ({"weight_decay": 0.3}, torch.optim.AdamW),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_a_vit_equals_a_plain_peft_loop(name: str) -> None:
    values, kind = OPTIMIZERS[name]
    recipe = make_recipe(clients__optimizer={"name": name, **values})
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer)
    _, trained = only(train(trainer, [1], state, local_plan(lr=0.02)))
    expected = plain_loop(
        peft_net(recipe, workload, state),
        workload,
        batches_of(recipe, workload, client=1, round_index=1),
        lambda parameters: kind(parameters, lr=0.02, **values),
    )
    assert largest_difference(trained, state) > 0.01
    assert_matches_peft(trained, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_a_bert_equals_a_plain_peft_loop_on_padded_texts(
    name: str, questions: Path
) -> None:
    values, kind = OPTIMIZERS[name]
    recipe = text_recipe(questions, clients__optimizer={"name": name, **values})
    workload = prepare(recipe)
    trainer = LocalTrainer(recipe, workload)
    state = adapter_state(trainer)
    _, trained = only(train(trainer, [3], state, local_plan(lr=0.02)))
    expected = plain_loop(
        peft_net(recipe, workload, state),
        workload,
        batches_of(recipe, workload, client=3, round_index=1),
        lambda parameters: kind(parameters, lr=0.02, **values),
    )
    assert largest_difference(trained, state) > 0.01
    assert_matches_peft(trained, expected)


def test_a_full_round_equals_a_plain_torch_loop_on_every_weight() -> None:
    recipe = make_recipe()
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = AdapterState({}, initial_tensors(trainer, "full"))
    plan = local_plan(trainable="full", proximal_weight=0.5)
    _, trained = only(train(trainer, [1], state, plan))
    net = plain_net(recipe, workload)
    batches = batches_of(recipe, workload, client=1, round_index=1)
    expected = plain_loop(net, workload, batches, sgd(), mu=0.5)
    assert list(trained.dense) == list(expected)
    for name, tensor in trained.dense.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_the_proximal_term_pulls_factors_and_head_back_to_what_was_received() -> None:
    recipe = make_recipe()
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer)
    _, pulled = only(train(trainer, [1], state, local_plan(proximal_weight=2.0)))
    _, free = only(train(trainer, [1], state, local_plan()))
    batches = batches_of(recipe, workload, client=1, round_index=1)
    expected = plain_loop(peft_net(recipe, workload, state), workload, batches, sgd(), mu=2.0)
    assert_matches_peft(pulled, expected)
    assert largest_difference(pulled, state) < largest_difference(free, state)


def test_the_training_loss_leaves_the_proximal_term_out() -> None:
    recipe = make_recipe(clients__local_steps=1)
    trainer = image_trainer(recipe)
    state = adapter_state(trainer)
    one, _ = only(train(trainer, [1], state, local_plan(proximal_weight=0.0)))
    other, _ = only(train(trainer, [1], state, local_plan(proximal_weight=100.0)))
    assert one.train_loss == other.train_loss


def test_gradients_longer_than_the_limit_are_cut_to_it() -> None:
    recipe = make_recipe(clients__max_grad_norm=0.05)
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer)
    _, trained = only(train(trainer, [1], state, local_plan()))
    batches = batches_of(recipe, workload, client=1, round_index=1)
    net = peft_net(recipe, workload, state)
    expected = plain_loop(net, workload, batches, sgd(), longest_gradient=0.05)
    assert_matches_peft(trained, expected)
    # Five steps of lr 0.1 along gradients no longer than 0.05 lead no farther than 0.025.
    moved = sum(float(((a - b) ** 2).sum()) for (_, a), (_, b)
                in zip(arrays_of(trained), arrays_of(state), strict=True))  # fmt: skip
    assert 0.005 < math.sqrt(moved) <= 0.0251


def test_local_epochs_take_every_example_once_a_pass() -> None:
    recipe = make_recipe(clients__local_steps=None, clients__local_epochs=2)
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer)
    _, trained = only(train(trainer, [1], state, local_plan()))
    batches = batches_of(recipe, workload, client=1, round_index=1)
    # 12 examples in batches of 5: 5 + 5 + 2, twice.
    assert [len(rows) for rows in batches] == [5, 5, 2, 5, 5, 2]
    expected = plain_loop(peft_net(recipe, workload, state), workload, batches, sgd())
    assert_matches_peft(trained, expected)


def test_a_client_with_fewer_examples_than_a_batch_takes_all_of_them_in_each_step() -> None:
    recipe = make_recipe(clients__local_steps=4)
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer)
    update, trained = only(train(trainer, [0], state, local_plan()))
    whole = [workload.clients.examples(0)] * 4
    expected = plain_loop(peft_net(recipe, workload, state), workload, whole, sgd())
    assert update.examples == 3
    assert_matches_peft(trained, expected)


def test_a_client_whose_loss_is_not_a_number_fails_alone() -> None:
    recipe = make_recipe(clients__local_steps=2)
    clean = image_trainer(recipe)
    rows = image_workload(recipe).clients.examples(2)
    trainer = image_trainer(recipe, spoilt(images(sum(SIZES), 1), "pixel_values", rows, np.nan))
    state = adapter_state(trainer)
    before, failed, after = train(trainer, [1, 2, 3], state, local_plan())
    assert failed.error == "loss is nan in local step 1 of 2"
    assert failed.state is None
    assert math.isnan(failed.train_loss)
    for update, client in ((before, 1), (after, 3)):
        _, expected = only(train(clean, [client], state, local_plan()))
        assert_close(update.state, expected)


def test_weights_that_overflow_in_the_last_step_fail_the_client() -> None:
    # The loss is finite; a step of 1e30 along 1e30 times the weights is beyond float32's 3e38.
    recipe = make_recipe(clients__local_steps=1, clients__optimizer__weight_decay=1e30)
    trainer = image_trainer(recipe)
    (failed,) = train(trainer, [1], adapter_state(trainer), local_plan(lr=1e30))
    assert failed.error == "weights are not finite after 1 local steps"
    assert failed.state is None


def test_bf16_computes_nearly_the_same_and_keeps_float32_weights() -> None:
    exact, rounded = make_recipe(), make_recipe(runtime__precision="bf16")
    state = adapter_state(image_trainer(exact))
    reference, expected = only(train(image_trainer(exact), [1], state, local_plan()))
    update, trained = only(train(image_trainer(rounded), [1], state, local_plan()))
    # bfloat16 has 8 bits: a relative rounding error of 2**-9 in each product.
    assert update.train_loss != reference.train_loss
    assert update.train_loss == pytest.approx(reference.train_loss, rel=0.02)
    assert 0 < largest_difference(trained, expected) < 0.2 * largest_difference(expected, state)
    assert {array.dtype for _, array in arrays_of(trained)} == {np.dtype(np.float32)}


def test_evaluation_is_in_float32_whatever_the_training_precision() -> None:
    exact, rounded = make_recipe(), make_recipe(runtime__precision="bf16")
    state = adapter_state(image_trainer(exact))
    rows = slice(0, 23)
    one = predict(image_trainer(exact), rows, state)
    other = predict(image_trainer(rounded), rows, state)
    np.testing.assert_array_equal(other.probabilities, one.probabilities)


DROPPING = {"adapter__dropout": 0.5, "model__config": {**VIT, "hidden_dropout_prob": 0.1}}


def test_dropout_of_a_client_does_not_depend_on_who_was_trained_before() -> None:
    recipe = make_recipe(**DROPPING)
    alone, busy = image_trainer(recipe), image_trainer(recipe)
    state = adapter_state(alone)
    _, expected = only(train(alone, [2], state, local_plan()))
    predict(busy, slice(0, 5), state)
    torch.manual_seed(99)
    *_, last = train(busy, [4, 0, 2], state, local_plan())
    assert_close(last.state, expected)


def test_dropout_of_a_client_does_not_depend_on_a_full_round_before_it() -> None:
    recipe = make_recipe(**DROPPING)
    fresh, used = image_trainer(recipe), image_trainer(recipe)
    state = adapter_state(fresh)
    _, expected = only(train(fresh, [2], state, local_plan()))
    whole = AdapterState({}, initial_tensors(used, "full"))
    train(used, [1], whole, local_plan(trainable="full"))
    _, trained = only(train(used, [2], state, local_plan()))
    assert_same_bits(trained, expected)


def together(trainers: Sequence[LocalTrainer], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether trainers in threads of their own train at the same time."""
    meeting = Barrier(len(trainers))
    met: list[bool] = []

    def train_group(*_: Any) -> BlockUpdate:
        try:
            meeting.wait(timeout=1.0)
            met.append(True)
        except BrokenBarrierError:
            met.append(False)
        return BlockUpdate((), [])

    def trained(trainer: LocalTrainer) -> None:
        monkeypatch.setattr(trainer, "_train_group", train_group)
        model = GlobalModel(adapter_state(trainer), Base(), "adapter")
        trainer.run(Train(model, local_plan(), "factor-average", ((0,),)))

    with ThreadPoolExecutor(len(trainers)) as threads:
        list(threads.map(trained, trainers))
    return all(met)


def test_trainers_of_one_process_take_turns_where_they_may_draw_from_its_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm, dropping = make_recipe(), make_recipe(**DROPPING)
    assert together([image_trainer(calm), image_trainer(calm)], monkeypatch)
    assert not together([image_trainer(dropping), image_trainer(dropping)], monkeypatch)


def test_dropout_is_drawn_anew_for_each_round_and_client() -> None:
    # Client 0 takes all its 3 examples in its one step; only their order and dropout are drawn.
    recipe = make_recipe(clients__local_steps=1, **DROPPING)
    calm = make_recipe(clients__local_steps=1)
    state = adapter_state(image_trainer(recipe))

    def trained(of: Recipe, t: int) -> AdapterState:
        return only(train(image_trainer(of), [0], state, local_plan(round=t)))[1]

    assert largest_difference(trained(calm, 1), trained(calm, 2)) < 1e-5
    assert largest_difference(trained(recipe, 1), trained(recipe, 2)) > 1e-3


def test_the_order_of_clients_changes_no_bit() -> None:
    recipe = make_recipe(**DROPPING)
    trainer = image_trainer(recipe)
    state = adapter_state(trainer)
    one = {u.client: u.state for u in train(trainer, [0, 1, 2], state, local_plan())}
    other = {u.client: u.state for u in train(trainer, [2, 0, 1], state, local_plan())}
    assert list(other) == [2, 0, 1]
    for client, trained in one.items():
        assert_same_bits(other[client], trained)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("block", [[1, 3], [0]], ids=["together", "alone"])
def test_an_optimiser_knows_nothing_of_the_block_before(name: str, block: list[int]) -> None:
    recipe = make_recipe(clients__optimizer={"name": name, **OPTIMIZERS[name][0]})
    used, fresh = image_trainer(recipe), image_trainer(recipe)
    state = adapter_state(fresh)
    train(used, block, state, local_plan(lr=0.01))
    predict(used, slice(0, 8), state)
    found, expected = (train(t, block, state, local_plan(lr=0.02)) for t in (used, fresh))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one.state, other.state)


def test_an_optimiser_knows_nothing_of_a_block_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(clients__optimizer={"name": "sgd", "momentum": 0.9})
    used, fresh = image_trainer(recipe), image_trainer(recipe)
    state, steps = adapter_state(fresh), []
    compute = used._gradients.losses

    def fails(*args: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            raise ValueError("a third step")
        return compute(*args)

    monkeypatch.setattr(used._gradients, "losses", fails)
    with pytest.raises(ClientError, match="a third step"):
        train(used, [1], state, local_plan())
    found, expected = (only(train(t, [1], state, local_plan())) for t in (used, fresh))
    assert_same_bits(found[1], expected[1])


def test_training_does_not_change_the_state_it_was_given() -> None:
    recipe = make_recipe()
    trainer = image_trainer(recipe)
    state, copy = adapter_state(trainer), adapter_state(trainer)
    train(trainer, [1], state, local_plan())
    assert_same_bits(state, copy)


def test_with_no_rank_and_no_trained_head_nothing_is_trained() -> None:
    recipe = make_recipe(adapter__train_head=False)
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = replace(adapter_state(trainer, rank=0), dense={})
    update, trained = only(train(trainer, [0], state, local_plan(proximal_weight=1.0)))
    assert_same_bits(trained, state)
    inputs, labels = inputs_of(workload, workload.clients.examples(0))
    with torch.no_grad():
        logits = plain_net(recipe, workload)(**inputs).logits
    loss = functional.cross_entropy(logits, labels).item()
    assert update.train_loss == pytest.approx(loss, rel=1e-5)


def test_with_no_rank_the_head_alone_is_trained() -> None:
    recipe = make_recipe()
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer, rank=0)
    _, trained = only(train(trainer, [1], state, local_plan()))
    net = plain_net(recipe, workload)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in HEAD)
    batches = batches_of(recipe, workload, client=1, round_index=1)
    expected = plain_loop(net, workload, batches, sgd())
    for name in HEAD:
        np.testing.assert_allclose(trained.dense[name], expected[name], rtol=1e-4, atol=2e-6)


def added(parts: Sequence[Predictions]) -> tuple[int, float, int]:
    return (
        sum(len(part.labels) for part in parts),
        sum(float(part.losses.sum()) for part in parts),
        sum(int(part.correct.sum()) for part in parts),
    )


def test_evaluation_in_shards_adds_up_to_a_plain_evaluation() -> None:
    recipe = make_recipe()
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state = adapter_state(trainer)
    net = peft_net(recipe, workload, state).eval()
    with torch.no_grad():
        logits = net(pixel_values=torch.tensor(workload.test.inputs["pixel_values"])).logits
    labels = torch.tensor(workload.test.labels)
    loss = functional.cross_entropy(logits, labels, reduction="sum").item()
    correct = int((logits.argmax(1) == labels).sum())
    for size in (23, 7):
        shards = [slice(i, min(i + size, 23)) for i in range(0, 23, size)]
        parts = [predict(trainer, rows, state) for rows in shards]
        assert added(parts) == (23, pytest.approx(loss, rel=1e-5), correct)


def test_evaluation_of_texts_sorted_by_length_equals_a_plain_one(questions: Path) -> None:
    recipe = text_recipe(questions)
    workload = prepare(recipe)
    trainer = LocalTrainer(recipe, workload)
    state = adapter_state(trainer)
    net = peft_net(recipe, workload, state).eval()
    inputs = {n: torch.tensor(v).long() for n, v in workload.test.inputs.items()}
    labels = torch.tensor(workload.test.labels)
    with torch.no_grad():
        logits = net(**inputs).logits
    loss = functional.cross_entropy(logits, labels, reduction="sum").item()
    # 60 questions, a fifth of them held back for the test.
    parts = [predict(trainer, slice(i, i + 5), state) for i in (0, 5, 10)]
    correct = int((logits.argmax(1) == labels).sum())
    assert added(parts) == (12, pytest.approx(loss, rel=1e-5), correct)


def test_the_validation_split_is_another_one_than_the_test_split() -> None:
    recipe = make_recipe()
    trainer = image_trainer(recipe)
    state = adapter_state(trainer)
    for split, rows in (("validation", 4), ("test", 23)):
        found = predict(trainer, slice(0, rows), state, split=split)
        assert len(found.labels) == rows


@pytest.mark.parametrize("batch", [256, 2])
def test_clients_are_tested_on_their_own_rows_as_each_would_be_alone(batch: int) -> None:
    recipe = make_recipe(evaluation__batch_size=batch)
    workload = image_workload(recipe)
    held = ClientTable(np.array([3, 1, 7, 5, 9, 0]), np.array([0, 2, 2, 5, 6]))
    trainer = LocalTrainer(recipe, replace(workload, held_out=held))
    one = adapter_state(trainer)
    other = AdapterState(
        {n: replace(f, b=f.b + np.float32(0.3)) for n, f in one.factors.items()}, one.dense
    )
    clients, starts = [3, 0, 1, 2], [one, other, one, one]
    task = TestClients(
        GlobalModel(one, Base(), "adapter"),
        blocks=((3, 0), (1, 2)),
        personal={0: {name: f.b for name, f in other.factors.items()}},
    )
    found = trainer.run(task)
    # Client 1 holds nothing out.
    assert [(score.client, score.examples) for score in found] == [(3, 1), (0, 2), (2, 3)]
    for score in found:
        net = peft_net(recipe, workload, starts[clients.index(score.client)]).eval()
        rows = held.examples(score.client)
        with torch.no_grad():
            pixels = torch.tensor(workload.train.inputs["pixel_values"][rows])
            logits = net(pixel_values=pixels).logits
        labels = torch.tensor(workload.train.labels[rows])
        loss = functional.cross_entropy(logits, labels).item()
        assert score.loss == pytest.approx(loss, rel=1e-4)
        assert score.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_without_held_out_rows_no_client_is_tested() -> None:
    trainer = image_trainer(make_recipe())
    model = GlobalModel(adapter_state(trainer), Base(), "adapter")
    assert trainer.run(TestClients(model, ((0,),))) == ()


def test_evaluation_has_no_dropout() -> None:
    calm, dropping = image_trainer(make_recipe()), image_trainer(make_recipe(**DROPPING))
    state = adapter_state(calm)
    rows = slice(0, 23)
    expected = predict(calm, rows, state)
    found = predict(dropping, rows, state)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)


def test_a_client_that_raises_is_named_with_its_round_and_traceback() -> None:
    recipe = make_recipe()
    rows = image_workload(recipe).clients.examples(3)
    trainer = image_trainer(recipe, spoilt(images(sum(SIZES), 1), "labels", rows, CLASSES + 4))
    with pytest.raises(ClientError, match="client 3 failed in round 2") as raised:
        train(trainer, [1, 3], adapter_state(trainer), local_plan())
    assert (raised.value.client, raised.value.round_index) == (3, 1)
    assert "Target 7 is out of bounds" in raised.value.trace
    assert "cross_entropy" in raised.value.trace


def test_the_trainers_shape_is_that_of_its_model() -> None:
    recipe = make_recipe()
    trainer = image_trainer(recipe)
    tensors = initial_tensors(trainer, "full")
    assert trainer.shape().total_params == sum(tensor.size for tensor in tensors.values())
    assert tuple(initial_tensors(trainer, "adapter")) == trainer.shape().head == HEAD


def test_two_trainers_of_one_recipe_start_from_the_same_weights_and_seeds_differ() -> None:
    one, same = image_trainer(make_recipe()), image_trainer(make_recipe())
    other = image_trainer(make_recipe(seed=6))
    for name, tensor in initial_tensors(one, "full").items():
        np.testing.assert_array_equal(initial_tensors(same, "full")[name], tensor)
    weight = "classifier.weight"
    assert not np.array_equal(
        initial_tensors(other, "full")[weight], initial_tensors(one, "full")[weight]
    )


def test_the_initial_tensors_are_those_of_the_seed_also_after_training() -> None:
    trainer = image_trainer(make_recipe())
    before = initial_tensors(trainer, "adapter")
    train(trainer, [1], adapter_state(trainer), local_plan())
    for name, tensor in initial_tensors(trainer, "adapter").items():
        np.testing.assert_array_equal(tensor, before[name])


def test_running_statistics_of_one_clients_batches_do_not_reach_anyone_else() -> None:
    # A model with batch normalisation: its statistics are no parameters and are in no state.
    config = {
        "architecture": "mobilevit",
        "image_size": 32,
        "num_channels": 1,
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [8] * 7,
        "num_attention_heads": 2,
    }
    recipe = make_recipe(model__config=config, clients__local_steps=1)
    rng = np.random.default_rng(0)
    pixels = rng.normal(3.0, 2.0, (sum(SIZES), 1, 32, 32)).astype(np.float32)
    many = Examples.of({"pixel_values": pixels}, np.zeros(sum(SIZES), np.int64))
    values = {k: v for k, v in config.items() if k != "architecture"}
    facts = AutoConfig.for_model("mobilevit", num_labels=CLASSES, **values).to_dict()
    workload = replace(image_workload(make_recipe()), train=many, test=many, config=facts)
    trainer = LocalTrainer(recipe, workload)
    dense = initial_tensors(trainer, "full")
    whole = AdapterState({}, {n: (t + rng.normal(0, 0.1, t.shape)).astype(np.float32)
                              for n, t in dense.items()})  # fmt: skip
    before = predict(trainer, slice(0, 8), whole, trainable="full")
    train(trainer, [0], whole, local_plan(trainable="full", lr=1e-3))
    after = predict(trainer, slice(0, 8), whole, trainable="full")
    np.testing.assert_array_equal(after.losses, before.losses)


def test_images_that_are_read_at_once_train_to_the_same_bits(monkeypatch):
    recipe = make_recipe(clients__local_steps=4)
    state = adapter_state(image_trainer(recipe))
    take, read = Examples.rows, []

    def rows(self: Examples, indices: np.ndarray) -> Any:
        read.append(len(indices))
        return take(self, indices)

    def trained(at_once: int) -> list[bytes]:
        monkeypatch.setattr(drawing_module, "_READ_AT_ONCE", at_once)
        updates = train(image_trainer(recipe), [4, 0, 2], state, local_plan())
        return [update.state.dense[HEAD[0]].tobytes() for update in updates]

    one_by_one = trained(0)
    monkeypatch.setattr(Examples, "rows", rows)
    assert trained(1 << 22) == one_by_one
    # Three to try the model on, together and alone, and two to see it by; then four steps of three
    # clients with a batch of five each.
    assert read == [3, 1, 1, 1, 2, 60]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("other", [0.0, 1e30, -np.inf])
def test_one_value_is_enough_not_to_be_finite(value: float, other: float) -> None:
    values = np.ones((3, 50), np.float32)
    values[0, 0] = 1e30
    assert all_finite(values)
    values[1, 2], values[2, 7] = value, other
    assert not all_finite(values)


@pytest.mark.e2e
def test_what_a_failed_client_has_made_is_gone_while_the_others_are_trained_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe()
    rows = image_workload(recipe).clients.examples(3)
    trainer = image_trainer(recipe, spoilt(images(sum(SIZES), 1), "labels", rows, CLASSES + 4))
    compute, made, alive = trainer._gradients.losses, [], []

    def losses(*args: Any) -> torch.Tensor:
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        tensor = torch.zeros(3)
        made.append(weakref.ref(tensor))
        return compute(*args)

    monkeypatch.setattr(trainer._gradients, "losses", losses)
    found = train(trainer, [1, 3, 2], adapter_state(trainer), local_plan(tolerant=True))
    assert [update.usable for update in found] == [True, False, True]
    # Together, alone until the third client raises, and without it: five steps each.
    assert len(alive) == 1 + 5 + 1 + 5
    assert alive == [0] * len(alive)
