"""Recorded passes: the same bits as those that Python runs, whatever is loaded in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayfed_lora.models import recorded
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Base, Predictions
from tests.tasks import Update, initial_tensors, local_plan, predict, train
from tests.unit.test_trainer import (
    adapter_state,
    image_trainer,
    make_recipe,
    questions,
    text_recipe,
)

__all__ = ["questions"]

BLOCKS = ([4, 0, 2], [1, 3], [0, 3, 4], [2, 1], [4, 2, 1])


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "PASSES_BEFORE", 2)
    monkeypatch.setattr(recorded, "PASSES_WORTH", 0)


def pair(recipe: Recipe) -> tuple[LocalTrainer, LocalTrainer]:
    """Return a trainer that records, and one that never does."""
    one, other = image_trainer(recipe), image_trainer(recipe)
    other._passes._recording = False
    return one, other


def kinds(trainer: LocalTrainer) -> set[tuple[bool, bool]]:
    """Return what is recorded: passes in training mode, with gradients."""
    return {kind[:2] for kind in trainer._passes._recorded}


def bits(update: Update) -> dict[str, bytes]:
    assert update.state is not None
    found = {name: tensor.tobytes() for name, tensor in update.state.dense.items()}
    for name, f in update.state.factors.items():
        found |= {f"{name} a": f.a.tobytes(), f"{name} b": f.b.tobytes()}
    return {**found, "loss": np.float64(update.train_loss).tobytes()}


def trained(
    trainer: LocalTrainer, state: AdapterState, base: Base | None = None, **plan: Any
) -> list[dict[str, bytes]]:
    return [
        bits(update)
        for t, block in enumerate(BLOCKS)
        for update in train(trainer, block, state, local_plan(round=t, **plan), base)
    ]


def scored(trainer: LocalTrainer, state: AdapterState, base: Base | None = None) -> bytes:
    rows = [slice(i, i + 5) for i in (0, 5, 10, 15)]
    parts: list[Predictions]
    parts = [predict(trainer, r, state, base) for r in rows]
    return b"".join(part.losses.tobytes() for part in parts)


@pytest.mark.parametrize("clients", [{}, {"clients__max_grad_norm": 0.1}], ids=["plain", "cut"])
def test_recorded_passes_train_and_test_to_the_same_bits(clients: dict[str, Any]) -> None:
    one, other = pair(make_recipe(clients__local_steps=3, **clients))
    state = adapter_state(one)
    for rank in (4, 4, 2):
        state = adapter_state(one, rank)
        assert trained(one, state) == trained(other, state)
        assert scored(one, state) == scored(other, state)
    assert kinds(one) == {(True, True), (False, False)}
    assert kinds(other) == set()
    # One kind a rank, number of clients and size of batches: the pass was not run by Python.
    calls = []
    forward = one._model.net.forward
    one._model.net.forward = lambda *a, **k: (calls.append(1), forward(*a, **k))[1]  # type: ignore[assignment,func-returns-value]
    assert trained(one, state) == trained(other, state)
    assert scored(one, state) == scored(other, state)
    assert calls == []


def test_scales_and_frozen_factors_are_those_of_the_states_that_are_loaded() -> None:
    one, other = pair(make_recipe(clients__local_steps=3))
    for scale, frozen in ((2.0, None), (0.5, None), (0.5, "a"), (2.0, "b")):
        state = adapter_state(one, 4, scale)
        assert trained(one, state, frozen=frozen) == trained(other, state, frozen=frozen)
    assert kinds(one) == {(True, True)}


def test_after_a_merge_or_a_full_model_round_passes_are_those_of_the_new_base() -> None:
    one, other = pair(make_recipe(clients__local_steps=3))
    state = adapter_state(one)
    assert trained(one, state) == trained(other, state)
    name, sizes = next(iter(one.shape().modules.items()))
    step = np.full((sizes.d_out, sizes.d_in), 0.1, np.float32)
    merged = Base(merges=1, merged={name: step})
    before = trained(one, state)
    assert trained(one, state, merged) == trained(other, state, merged) != before
    assert kinds(one) == {(True, True)}
    whole = AdapterState({}, initial_tensors(one, "full"))
    full = [trained(each, whole, trainable="full") for each in (one, other)]
    assert full[0] == full[1]
    assert trained(one, state) == trained(other, state) == before


@pytest.mark.parametrize("wrong", ["other", "raises"])
def test_a_recording_that_gives_anything_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def trace(run: Any, given: Any, **_: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("no such thing")
        return lambda *tensors: run(*tensors) + 1e-3

    monkeypatch.setattr(torch.jit, "trace", trace)
    one, other = pair(make_recipe(clients__local_steps=3))
    state = adapter_state(one)
    assert trained(one, state) == trained(other, state)
    assert kinds(one) == set()
    assert not one._passes._recording


@pytest.mark.parametrize(
    "changes",
    [{"adapter__dropout": 0.1}, {"runtime__precision": "bf16"}],
    ids=["dropout", "bf16"],
)
def test_what_draws_or_is_rounded_on_the_way_is_not_recorded(changes: dict[str, Any]) -> None:
    trainer = image_trainer(make_recipe(clients__local_steps=3, **changes))
    trained(trainer, adapter_state(trainer))
    assert kinds(trainer) == set()


def test_a_text_model_is_not_recorded_whose_masks_depend_on_what_is_read(questions: Path) -> None:
    recipe = text_recipe(questions, clients__local_steps=3)
    trainer = LocalTrainer(recipe, prepare(recipe))
    trained(trainer, adapter_state(trainer))
    assert kinds(trainer) == set()


def test_a_pass_is_recorded_where_the_rest_of_the_run_is_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorded, "PASSES_WORTH", 20)
    recipe = make_recipe(clients__local_steps=3)
    total = recipe.annealing.total_rounds

    def recorded_in(t: int) -> set[tuple[bool, bool]]:
        trainer = image_trainer(recipe)
        state = adapter_state(trainer)
        # Nine passes of one kind.
        for _ in range(3):
            train(trainer, [4, 1], state, local_plan(round=t))
        return kinds(trainer)

    assert total == 20
    # After 9 passes in 3 rounds 51 more are to be expected in 17, in 15 rounds 3 more in 5.
    assert recorded_in(2) == {(True, True)}
    assert recorded_in(14) == set()
