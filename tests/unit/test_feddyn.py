"""FedDyn against its paper's algorithm 1 in a plain torch loop, and what it keeps and sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from rayfed_lora.errors import PluginError, RecipeError, RunError
from rayfed_lora.federation.traffic import RoundFacts
from rayfed_lora.objectives.objective import objective
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.objectives.remembered import Remembered
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import AdapterState, Factors
from tests.tasks import local_plan
from tests.unit.test_client_memory import bill_of
from tests.unit.test_objectives import CLIENTS, FULL, assert_all_close, played
from tests.unit.test_trainer import (
    batches_of,
    image_workload,
    inputs_of,
    largest_difference,
    make_recipe,
    plain_net,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ALPHA = 0.2
FEDDYN: dict[str, Any] = {
    **FULL,
    "method": "feddyn",
    "clients__objective": {"name": "feddyn", "alpha": ALPHA},
    "clients__weight": "uniform",
}


def plain_feddyn(
    recipe: Recipe, cohorts: list[tuple[int, ...]]
) -> tuple[dict[str, torch.Tensor], dict[int, Any], dict[str, torch.Tensor]]:
    """Train the full model as algorithm 1 says, the argmin by the recipe's steps of sgd.

    Returns:
        theta, the gradients of the clients' losses at their last models, and h.
    """
    workload, lr = image_workload(recipe), recipe.clients.optimizer.lr
    net = plain_net(recipe, workload)
    theta = {n: p.detach().clone() for n, p in net.named_parameters()}
    h = {n: torch.zeros_like(p) for n, p in theta.items()}
    grads: dict[int, Any] = {
        k: {n: torch.zeros_like(p) for n, p in theta.items()} for k in range(CLIENTS)
    }
    for t, cohort in enumerate(cohorts):
        own: dict[int, Any] = {}
        for k in cohort:
            with torch.no_grad():
                for n, p in net.named_parameters():
                    p.copy_(theta[n])
            for rows in batches_of(recipe, workload, k, t):
                inputs, labels = inputs_of(workload, rows)
                net.zero_grad()
                loss = functional.cross_entropy(net(**inputs).logits, labels)
                for n, p in net.named_parameters():
                    linear = (grads[k][n] * p).sum()
                    loss = loss - linear + ALPHA / 2 * ((p - theta[n]) ** 2).sum()
                loss.backward()
                with torch.no_grad():
                    for p in net.parameters():
                        p.sub_(lr * p.grad)
            own[k] = {n: p.detach().clone() for n, p in net.named_parameters()}
            grads[k] = {n: g - ALPHA * (own[k][n] - theta[n]) for n, g in grads[k].items()}
        h = {n: h[n] - ALPHA / CLIENTS * sum(own[k][n] - theta[n] for k in cohort) for n in h}
        theta = {n: sum(own[k][n] for k in cohort) / len(cohort) - h[n] / ALPHA for n in h}
    return theta, grads, h


def test_feddyn_with_two_of_five_clients_a_round_is_that_of_its_paper() -> None:
    recipe = make_recipe(**FEDDYN)
    runs, cohorts = played(recipe)
    theta, grads, h = plain_feddyn(recipe, cohorts)
    assert_all_close(runs[-1].model.state.dense, theta)
    assert_all_close(runs[-1].shared, h)
    part = sorted({k for cohort in cohorts for k in cohort})
    # Only clients that took part have memory; some took part again, with what they remembered.
    assert sorted(runs[-1].memory) == part
    assert len(part) < sum(map(len, cohorts))
    for k in part:
        assert_all_close(runs[-1].memory[k], grads[k])
    other, _ = played(make_recipe(**{**FEDDYN, "method": "fedavg", "clients__objective": "none"}))
    assert largest_difference(other[-1].model.state, runs[-1].model.state) > 1e-3


def adapter(a: float, b: float, head: float) -> AdapterState:
    factors = {"q": Factors(np.full((1, 2), a, np.float32), np.full((2, 1), b, np.float32), 1.0)}
    return AdapterState(factors, {"head": np.full(2, head, np.float32)})


def test_the_server_steps_the_trained_tensors_alone_and_h_stays_with_it() -> None:
    start, mean = adapter(1.0, 0.0, 2.0), adapter(1.0, 0.5, 3.0)
    shared = {"B of q": np.full((2, 1), 0.1, np.float32), "head": np.zeros(2, np.float32)}
    known = Remembered("feddyn", {"alpha": 0.5}, {}, shared)
    state, h = known.model_after(start, mean, local_plan(frozen="a"), 2, 10)
    # h = 0.1 - 0.5 * 2/10 * (0.5 - 0) = 0.05; B = 0.5 - 0.05 / 0.5 = 0.4.
    np.testing.assert_allclose(h["B of q"], 0.05, rtol=1e-6)
    np.testing.assert_allclose(state.factors["q"].b, 0.4, rtol=1e-6)
    # h = 0 - 0.5 * 2/10 * (3 - 2) = -0.1; head = 3 + 0.1 / 0.5 = 3.2.
    np.testing.assert_allclose(h["head"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(state.dense["head"], 3.2, rtol=1e-6)
    assert (state.factors["q"].a == 1.0).all()
    # Clients do not get h, and a round without updates changes nothing.
    assert known.of([0]).shared == {}
    assert known.model_after(start, mean, local_plan(), 0, 10) == (mean, shared)


def test_feddyn_sends_what_fedavg_sends() -> None:
    facts = RoundFacts("full", (0, 1, 2), np.array([True, True, False]))
    # The model of the fakes has 47 values; the third client sends nothing.
    assert bill_of("feddyn", facts) == bill_of("none", facts) == (2 * 47, 3 * 47, 5 * 47)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"aggregation.server_optimizer.lr": 0.5}, "expected sgd with lr 1, got sgd with lr 0.5"),
        ({"clients.ranks": 2, "annealing.mode": "fixed"}, "needs one rank"),
    ],
)
def test_what_feddyn_does_not_go_with_is_rejected(settings: dict[str, Any], told: str) -> None:
    given = {key.replace(".", "__"): value for key, value in settings.items()}
    with pytest.raises(RecipeError, match=told):
        make_recipe(clients__objective="feddyn", **{"annealing__mode": "full", **given})


class Wrong:
    """An objective whose step of the model is what `found` says."""

    found: Any = None

    def model(self, means: Any) -> Any:
        return self.found


def test_a_step_of_the_model_is_checked() -> None:
    objective("wrong-step", shared={"steps": ()})(Wrong)
    try:
        known = Remembered("wrong-step", shared={"steps": np.array(1.0, np.float32)})
        state = adapter(1.0, 1.0, 1.0)
        with pytest.raises(RunError, match=r"round 2: expected model\(\) to return \(model, sha"):
            known.model_after(state, state, local_plan(), 1, 2)
        Wrong.found = {"head": np.zeros(2, np.float32)}, {"steps": np.float32(1)}
        with pytest.raises(RunError, match="model in round 2: expected arrays by the names"):
            known.model_after(state, state, local_plan(), 1, 2)
    finally:
        Wrong.found = None
        OBJECTIVES.remove("wrong-step")


def test_an_objective_steps_the_model_or_shares_with_clients() -> None:
    class Both:
        def server(self, shared: Any, messages: Any, clients: int) -> Any: ...

        def model(self, means: Any) -> Any: ...

    with pytest.raises(PluginError, match="expected a method 'server' or 'model', got both"):
        objective(shared="trained")(Both)
