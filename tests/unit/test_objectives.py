"""Objectives of local training: their formulas against plain loops, and what clients remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from rayfed_lora.engines.factory import TorchFactory, in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.errors import ClientError, PluginError, RecipeError, RunError
from rayfed_lora.federation.run import Run, fresh
from rayfed_lora.federation.server import Server
from rayfed_lora.objectives.objective import objective, trained_tensors
from rayfed_lora.objectives.remembered import Remembered
from rayfed_lora.plugins.tables import OBJECTIVES
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import AdapterState, ClientReport
from tests.tasks import initial_tensors, local_plan, train
from tests.unit.test_methods import Silent
from tests.unit.test_trainer import (
    SIZES,
    adapter_state,
    assert_close,
    batches_of,
    image_trainer,
    image_workload,
    inputs_of,
    largest_difference,
    make_recipe,
    peft_net,
    peft_weights,
    plain_net,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

CLIENTS = len(SIZES)
SHORT: dict[str, Any] = {
    "annealing__heating__rounds": 3,
    "annealing__cooling__rounds": 0,
    "annealing__holding__rounds": 0,
    "annealing__initiating__rounds": 0,
    "clients__optimizer__lr": 0.1,
    "clients__local_steps": 3,
}
FULL = {"annealing__mode": "full", **SHORT}
FIXED = {"annealing__mode": "fixed", **SHORT}


class TinyFactory(TorchFactory):
    """A tiny ViT on random images."""

    def workload(self, recipe: Recipe) -> Any:
        return image_workload(recipe)


class Cohorts(Silent):
    """Keeps the cohort of each round."""

    def __init__(self) -> None:
        self.cohorts: list[tuple[int, ...]] = []

    def round_started(self, plan: Any, cohort: tuple[int, ...]) -> None:
        self.cohorts.append(cohort)


def played(recipe: Recipe) -> tuple[list[Run], list[tuple[int, ...]]]:
    """Return the run after each round, and the cohorts."""
    engine = LocalEngine(lambda: in_process(recipe, TinyFactory(), "cpu"))
    seen = Cohorts()
    population = engine.open()
    server = Server(recipe, engine, population, seen, lambda: False)
    return list(server.rounds(fresh(recipe, engine, population))), seen.cohorts


def plain_federated(
    recipe: Recipe, cohorts: list[tuple[int, ...]], *, control: bool
) -> tuple[dict[str, torch.Tensor], dict[int, Any], dict[str, torch.Tensor]]:
    """Train the full model by SCAFFOLD as its paper writes it (or FedAvg), in plain torch.

    Returns:
        The model, the clients' variates and the server's.
    """
    workload, lr = image_workload(recipe), recipe.clients.optimizer.lr
    net = plain_net(recipe, workload)
    x = {n: p.detach().clone() for n, p in net.named_parameters()}
    c = {n: torch.zeros_like(p) for n, p in x.items()}
    own: dict[int, Any] = {
        k: {n: torch.zeros_like(p) for n, p in x.items()} for k in range(CLIENTS)
    }
    for t, cohort in enumerate(cohorts):
        moved, changed = {}, {}
        for k in cohort:
            with torch.no_grad():
                for n, p in net.named_parameters():
                    p.copy_(x[n])
            batches = batches_of(recipe, workload, k, t)
            for rows in batches:
                inputs, labels = inputs_of(workload, rows)
                net.zero_grad()
                functional.cross_entropy(net(**inputs).logits, labels).backward()
                with torch.no_grad():
                    for n, p in net.named_parameters():
                        correction = c[n] - own[k][n] if control else 0.0
                        p.sub_(lr * (p.grad + correction))
            y = {n: p.detach().clone() for n, p in net.named_parameters()}
            new = {n: own[k][n] - c[n] + (x[n] - y[n]) / (len(batches) * lr) for n in x}
            changed[k] = {n: new[n] - own[k][n] for n in x}
            moved[k], own[k] = y, new if control else own[k]
        total = sum(SIZES[k] for k in cohort)
        x = {n: sum(SIZES[k] / total * moved[k][n] for k in cohort) for n in x}
        if control:
            c = {n: c[n] + sum(changed[k][n] for k in cohort) / CLIENTS for n in c}
    return x, own, c


def assert_all_close(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=2e-4, atol=5e-6, err_msg=name)


def test_scaffold_with_two_of_five_clients_a_round_is_that_of_its_paper() -> None:
    recipe = make_recipe(method="scaffold", **FULL)
    runs, cohorts = played(recipe)
    x, own, c = plain_federated(recipe, cohorts, control=True)
    assert_all_close(runs[-1].model.state.dense, x)
    assert_all_close(runs[-1].shared, c)
    part = sorted({k for cohort in cohorts for k in cohort})
    # Only clients that took part have any; some took part again, with what they remembered.
    assert sorted(runs[-1].memory) == part
    assert len(part) < sum(map(len, cohorts))
    for k in part:
        assert_all_close(runs[-1].memory[k], own[k])


def test_without_variates_the_same_loop_is_fedavg() -> None:
    recipe = make_recipe(method="fedavg", **FULL)
    runs, cohorts = played(recipe)
    x, _, _ = plain_federated(recipe, cohorts, control=False)
    assert_all_close(runs[-1].model.state.dense, x)
    assert runs[-1].memory == {} and runs[-1].shared == {}
    other, _ = played(make_recipe(method="scaffold", **FULL))
    # The first round is the same, since all variates are 0; later ones differ.
    assert largest_difference(other[0].model.state, runs[0].model.state) == 0.0
    assert largest_difference(other[-1].model.state, runs[-1].model.state) > 1e-4


def test_gradients_of_factors_are_corrected_client_by_client_in_one_batch() -> None:
    recipe = make_recipe(clients__local_steps=None, clients__local_epochs=1)
    trainer, workload = image_trainer(recipe), image_workload(recipe)
    state, plan = adapter_state(trainer), local_plan()
    trained = trained_tensors(state, None)
    rng = np.random.default_rng(0)
    memory = {
        k: {n: rng.normal(size=t.shape).astype(np.float32) for n, t in trained.items()}
        for k in (0, 2)
    }
    shared = {n: rng.normal(size=t.shape).astype(np.float32) for n, t in trained.items()}
    known = Remembered("scaffold", {}, memory, shared)
    updates = train(trainer, [0, 1, 2], state, plan, remembered=known)
    for update in updates:
        k = update.client
        net = peft_net(recipe, workload, state)
        variates = memory.get(k, {n: np.zeros_like(t) for n, t in trained.items()})
        correction = peft_weights_of(state, {n: shared[n] - variates[n] for n in trained})
        batches = batches_of(recipe, workload, client=k, round_index=1)
        net.train()
        for rows in batches:
            inputs, labels = inputs_of(workload, rows)
            net.zero_grad()
            functional.cross_entropy(net(**inputs).logits, labels).backward()
            with torch.no_grad():
                for n, p in net.named_parameters():
                    if p.requires_grad:
                        p.sub_(0.1 * (p.grad + torch.tensor(correction[n])))
        expected = {n: p.detach().numpy() for n, p in net.named_parameters() if p.requires_grad}
        assert update.state is not None
        assert_all_close(peft_weights(update.state), expected)
        assert update.steps == len(batches)
        # c_i+ = c_i - c + (x - y) / (K lr), in numpy on the states themselves.
        start, end = (trained_tensors(s, None) for s in (state, update.state))
        for n in trained:
            drift = (start[n] - end[n]) / (len(batches) * 0.1)
            want = variates[n] - shared[n] + drift
            np.testing.assert_allclose(update.memory[n], want, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(update.message[n], drift - shared[n], rtol=1e-4, atol=1e-5)
    # Clients have 1, 2 and 3 steps: they leave the group one after the other.
    assert sorted(update.steps for update in updates) == [1, 2, 3]


def peft_weights_of(like: AdapterState, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors by the names of `peft_weights`."""
    factors = {
        n: replace(f, a=values[f"A of {n}"], b=values[f"B of {n}"]) for n, f in like.factors.items()
    }
    return peft_weights(AdapterState(factors, {n: values[n] for n in like.dense}))


def test_with_a_client_at_a_time_the_hooks_get_the_same() -> None:
    recipe = make_recipe()
    trainer = image_trainer(recipe)
    state, plan = adapter_state(trainer), local_plan()
    shared = {n: np.ones_like(t) for n, t in trained_tensors(state, None).items()}
    known = Remembered("scaffold", {}, {}, shared)
    both = train(trainer, [1, 2], state, plan, remembered=known)
    for update in both:
        (alone,) = train(trainer, [update.client], state, plan, remembered=known)
        assert_close(update.state, alone.state)


def test_the_proximal_objective_is_the_stages_own_term() -> None:
    trainer = image_trainer(make_recipe())
    state = adapter_state(trainer)
    known = Remembered("proximal", {"weight": 2.0})
    (one,) = train(trainer, [1], state, local_plan(), remembered=known)
    (other,) = train(trainer, [1], state, local_plan(proximal_weight=2.0))
    assert_close(one.state, other.state)
    (free,) = train(trainer, [1], state, local_plan())
    assert largest_difference(one.state, free.state) > 1e-3


def test_label_smoothing_is_that_of_torch() -> None:
    loss = OBJECTIVES.with_options("label-smoothing", {"amount": 0.3}).hook("loss")
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(7, 4)), dtype=torch.float32)
    labels = torch.tensor(rng.integers(0, 4, 7))
    expected = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.3)
    assert loss is not None
    np.testing.assert_allclose(loss(logits, labels), expected, rtol=1e-5)


def test_an_objectives_own_loss_trains_the_model() -> None:
    trainer = image_trainer(make_recipe(clients__local_steps=1))
    state = AdapterState({}, initial_tensors(trainer, "adapter"))
    smooth = Remembered("label-smoothing", {"amount": 0.5})
    (one,) = train(trainer, [1], state, local_plan(), remembered=smooth)
    (other,) = train(trainer, [1], state, local_plan())
    # (1 - a) * p_label - p + a / K: the head's gradients differ by a * (onehot - 1 / K) x.
    assert one.train_loss != other.train_loss
    assert largest_difference(one.state, other.state) > 1e-4


class Wrong:
    """An objective whose hooks do what `fault` says."""

    fault = ""

    def gradient(self, local: Any) -> Any:
        if self.fault == "returns":
            return dict(local.gradients)
        if self.fault == "replaces":
            local.gradients["B of q"] = 0
        return None

    def loss(self, logits: Any, labels: Any) -> Any:
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses.mean() if self.fault == "mean" else losses

    def after(self, done: Any) -> Any:
        memory = {"seen": np.float32(done.steps)}
        message = {"loss": np.zeros(2)}
        if self.fault == "name":
            memory = {"other": np.float32(1)}
        if self.fault == "shape":
            message = {"loss": np.zeros(3)}
        if self.fault == "dtype":
            message = {"loss": np.zeros(2, np.int64)}
        if self.fault == "finite":
            message = {"loss": np.array([0.0, np.inf])}
        if self.fault == "write":
            next(iter(done.start.values()))[...] = 0
        return memory if self.fault == "pair" else (memory, message)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("returns", "expected gradient\\(\\) to change local.gradients in place .* got dict"),
        ("replaces", "does not support item assignment"),
        ("mean", "expected loss\\(\\) to return floats of shape \\(5,\\)"),
        ("name", "memory of client 1 in round 2: expected arrays by the names \\['seen'\\]"),
        (
            "shape",
            "message of client 1 in round 2, tensor 'loss': expected floats of shape \\(2,\\)",
        ),
        ("dtype", "expected floats of shape \\(2,\\), got int64"),
        ("finite", "tensor 'loss': expected finite values"),
        ("write", "read-only"),
        ("pair", "expected after\\(\\) to return \\(memory, message\\), got dict"),
    ],
)
def test_what_a_hook_may_not_do_is_told_with_its_client_and_round(fault: str, told: str) -> None:
    objective("wrong", memory={"seen": ()}, message={"loss": (2,)})(Wrong)
    try:
        trainer = image_trainer(make_recipe())
        state, known = adapter_state(trainer), Remembered("wrong")
        (fine,) = train(trainer, [1], state, local_plan(), remembered=known)
        assert fine.memory is not None and fine.memory["seen"] == 5
        Wrong.fault = fault
        with pytest.raises(ClientError, match=f"(?s){told}") as raised:
            train(trainer, [1], state, local_plan(), remembered=known)
        assert (raised.value.client, raised.value.round_index) == (1, 1)
    finally:
        Wrong.fault = ""
        OBJECTIVES.remove("wrong")


@pytest.mark.parametrize(
    ("settings", "path", "told"),
    [
        ({"clients.optimizer.name": "adamw"}, "clients.optimizer.name", "expected sgd, got adamw"),
        ({"clients.optimizer.momentum": 0.9}, "clients.optimizer.momentum", "expected 0, got 0.9"),
        ({"clients.max_grad_norm": 1.0}, "clients.max_grad_norm", "no clipping"),
        ({"annealing.mode": "staged"}, "annealing.cooling.rank", "needs one rank"),
        ({"clients.ranks": 2}, "clients.ranks", "needs one rank"),
        ({"aggregation.rule": "alternate"}, "aggregation.rule", "trains A and B in turns"),
        ({"aggregation.rule": "share-a"}, "aggregation.rule", "a B of its own"),
        ({"aggregation.rule": "stacking"}, "aggregation.rule", "starts LoRA anew"),
        ({"aggregation.rule": "product-svd"}, "aggregation.rule", "other coordinates"),
    ],
)
def test_what_scaffold_does_not_go_with_is_rejected(
    settings: dict[str, Any], path: str, told: str
) -> None:
    given = {"annealing.mode": "fixed", "clients.objective": "scaffold", **settings}
    make_recipe(annealing__mode="fixed", clients__objective="scaffold")
    with pytest.raises(RecipeError) as raised:
        make_recipe(**{key.replace(".", "__"): value for key, value in given.items()})
    found = [str(f) for f in raised.value.faults if f.path == path]
    assert any(told in text for text in found), found


def test_memory_begins_anew_when_adapter_rounds_follow_full_ones() -> None:
    settings = {**SHORT, "annealing__initiating__rounds": 1, "annealing__heating__rounds": 1}
    recipe = make_recipe(
        annealing__mode="staged",
        annealing__cooling__rank=4,
        clients__objective="scaffold",
        **settings,
    )
    (first, second), cohorts = played(recipe)
    assert set(first.shared) == set(first.model.state.dense)
    assert set(second.shared) == set(trained_tensors(second.model.state, None))
    assert sorted(second.memory) == sorted(cohorts[1])


class Sums:
    """Shares what `server` returns, which may be wrong."""

    found: Any = None

    def after(self, done: Any) -> Any:
        return {}, {"steps": np.float32(done.client)}

    def server(self, shared: Any, messages: Any, clients: int) -> Any:
        if self.found is not None:
            return self.found
        return {"steps": shared["steps"] + messages["steps"].sum() / clients}


def reported(known: Remembered, clients: list[int]) -> list[ClientReport]:
    state = AdapterState({}, {"head": np.zeros(2, np.float32)})
    reports = [ClientReport(k, 3, 0.5, 0.0, steps=1) for k in clients]
    plan = local_plan()
    return [known.reported(report, state, state, plan) for report in reports]


def test_the_server_gets_the_messages_in_order_and_what_it_returns_is_checked() -> None:
    objective("sums", message={"steps": ()}, shared={"steps": ()})(Sums)
    try:
        known = Remembered("sums", shared={"steps": np.array(1.0, np.float32)})
        reports = reported(known, [2, 3])
        reports.append(ClientReport(4, 3, float("nan"), 0.0, "loss is nan"))
        # 1 + (2 + 3) / 10; the failed client sent nothing.
        memory, shared = known.after_round(reports, 10, 4)
        assert memory == {} and shared["steps"] == np.float32(1.5)
        assert known.after_round(reports[2:], 10, 4)[1] == known.shared
        Sums.found = {"steps": np.zeros(2)}
        with pytest.raises(RunError, match="objective 'sums', shared in round 5, tensor 'steps'"):
            known.after_round(reports, 10, 4)
    finally:
        Sums.found = None
        OBJECTIVES.remove("sums")


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"memory": "all", "message": {"steps": ()}, "shared": {}}, "expected 'trained' or shapes"),
        ({"message": {"steps": ()}}, "has a method 'server', expected shared to be declared"),
    ],
)
def test_a_class_that_does_not_make_what_it_declares_is_rejected(
    declared: dict[str, Any], told: str
) -> None:
    with pytest.raises(PluginError, match=told):
        objective("sums", **declared)(Sums)
    assert "sums" not in OBJECTIVES


def test_a_class_without_hooks_for_what_it_declares_is_rejected() -> None:
    class Empty:
        def gradeint(self, local: Any) -> None: ...

    with pytest.raises(PluginError, match="declares memory, expected a method 'after'"):
        objective(memory="trained")(Empty)
    with pytest.raises(PluginError, match="expected a method named loss, gradient"):
        objective()(Empty)
