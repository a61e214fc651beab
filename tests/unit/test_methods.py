"""Methods at work in the round loop: what is frozen, kept by clients, merged and remembered."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rayfed_lora
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import RecipeError
from rayfed_lora.federation import sampling
from rayfed_lora.federation.run import Run, fresh
from rayfed_lora.federation.server import Server
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.tasks.messages import TestClients
from rayfed_lora.tasks.training import Starts
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel
from tests.fakes import SHAPE, FakeFactory, effective, local_engine, make_recipe


class Silent:
    """An observer that looks away."""

    def round_started(self, *args: Any) -> None: ...

    def clients_done(self, *args: Any) -> None: ...

    def round_done(self, *args: Any) -> None: ...


def progresses(**overrides: Any) -> list[Run]:
    """Return a run after each of its rounds."""
    recipe = make_recipe(**overrides)
    engine = local_engine(recipe)
    population = engine.open()
    server = Server(recipe, engine, population, Silent(), lambda: False)
    begun = fresh(recipe, engine, population)
    return [begun, *server.rounds(begun)]


def adapters(**overrides: Any) -> list[AdapterState]:
    return [p.model.state for p in progresses(**overrides) if p.model.state.factors]


def same(one: AdapterState, other: AdapterState, kind: str) -> bool:
    return all(
        np.array_equal(getattr(one.factors[m], kind), getattr(other.factors[m], kind))
        for m in SHAPE.modules
    )


def test_ffa_lora_never_changes_a():
    states = adapters(method="ffa-lora")
    assert len(states) == 6
    assert all(same(states[0], state, "a") for state in states)
    assert not any(same(x, y, "b") for x, y in pairwise(states))


def test_rolora_trains_b_and_a_in_turns():
    states = adapters(method="rolora")
    moved = [(not same(x, y, "a"), not same(x, y, "b")) for x, y in pairwise(states)]
    # B in round 0, then A, B, A, B, A.
    assert moved == [(True, False), (False, True), (True, False), (False, True), (True, False)]


def test_flora_holds_no_adapter_between_rounds_and_merges_each_into_the_base():
    runs = progresses(method="flora")
    assert [p.model.base.merges for p in runs] == [0, 1, 2, 3, 4, 5, 6]
    assert all(not p.model.state.factors for p in runs)


def test_the_update_that_flora_merges_is_the_exact_mean_of_its_clients():
    first, second = progresses(method="flora")[:2]
    merged = effective(second.model.state, second.model.base, "adapter")
    start = effective(first.model.state, first.model.base, "adapter")
    fed = progresses(method="fedex-lora")[1]
    exact = effective(fed.model.state, fed.model.base, "adapter")
    for module in SHAPE.modules:
        weight = f"{module}.weight"
        assert not np.allclose(merged[weight], start[weight])
        # FedEx-LoRA starts from the same factors: both are the exact mean.
        np.testing.assert_allclose(merged[weight], exact[weight], rtol=1e-5)


def test_in_fedsa_lora_a_client_goes_on_from_its_own_b():
    runs = progresses(method="fedsa-lora", clients__per_round=6)
    assert [len(p.personal) for p in runs] == [0, 6, 6, 6, 6, 6, 6]
    for client in range(6):
        moves = [
            float((after.personal[client]["q"] - before.personal[client]["q"])[0, 0])
            for before, after in pairwise(runs[1:])
        ]
        # The fake adds client + round to every value, of rounds 1 to 5 here.
        assert moves == [client + t for t in range(1, 6)]


def test_a_client_that_has_no_b_yet_starts_from_zero_and_not_from_others():
    runs = progresses(method="fedsa-lora")
    for before, after in pairwise(runs[1:]):
        for client in after.personal.keys() - before.personal.keys():
            t = before.rounds
            # The fake adds client + round to every value.
            np.testing.assert_array_equal(after.personal[client]["q"], client + t)
    assert len(runs[-1].personal) > len(runs[1].personal)


def test_personal_factors_may_follow_a_full_stage():
    runs = progresses(aggregation__rule="share-a", annealing__cooling__rank=3)
    assert [len(p.personal) for p in runs[:3]] == [0, 0, 3]


def test_a_client_that_was_not_drawn_keeps_its_own_b():
    runs = progresses(method="fedsa-lora")
    recipe = make_recipe(method="fedsa-lora")
    everyone = sampling.ClientHistory.empty(np.ones(6, np.int64))
    for t in range(1, 6):
        drawn = sampling.cohort(recipe, everyone, t)
        for client, b in runs[t].personal.items():
            if client not in drawn:
                np.testing.assert_array_equal(runs[t + 1].personal[client]["q"], b["q"])


def test_bitfit_and_head_only_train_no_factors():
    for method in ("bitfit", "head-only"):
        assert {f.rank for s in adapters(method=method) for f in s.factors.values()} == {0}


def test_a_server_optimiser_forgets_the_factors_when_their_rank_changes():
    settings = {"name": "momentum", "lr": 0.5, "momentum": 0.9}
    runs = progresses(aggregation__server_optimizer=settings)
    # Round 0 is full; rank 3 in rounds 1 and 2, then 2, 1, 1.
    full, *adapter = runs[1:]
    assert set(full.moments) == {"embed", "q.weight", "v.weight", "head"}
    names = {"head", *(f"{kind} of {m}" for kind in "AB" for m in SHAPE.modules)}
    assert all(set(p.moments) == names for p in adapter)
    ranks = [p.moments["A of q"][0].shape[0] for p in adapter]
    assert ranks == [3, 3, 2, 1, 1]
    # With nothing to remember, a round moves by the mean update alone: 0.5 of it.
    start = adapter[1].moments["A of q"][0]
    assert not np.allclose(start, adapter[0].moments["A of q"][0])


def test_ranks_are_dealt_in_turn_or_drawn_by_their_shares():
    recipe = make_recipe(method="flexlora", clients__ranks=[1, 3])
    assert sampling.rank_limits(recipe, 5).tolist() == [1, 3, 1, 3, 1]
    two = make_recipe(method="flexlora", clients__ranks=2)
    assert sampling.rank_limits(two, 3).tolist() == [2, 2, 2]
    assert sampling.rank_limits(make_recipe(), 3) is None
    shares = make_recipe(method="flexlora", clients__ranks={4: 1.0, 16: 3.0})
    drawn = sampling.rank_limits(shares, 4000)
    assert set(drawn.tolist()) == {4, 16}
    assert np.mean(drawn == 16) == pytest.approx(0.75, abs=0.03)
    turned = make_recipe(method="flexlora", clients__ranks={16: 3.0, 4: 1.0})
    np.testing.assert_array_equal(drawn, sampling.rank_limits(turned, 4000))


@pytest.mark.parametrize("ranks", [4, [1, 2, 8], {2: 0.25, 8: 0.75}])
def test_ranks_come_back_from_the_run_folders_recipe(ranks):
    recipe = make_recipe(method="flexlora", clients__ranks=ranks)
    again = load_recipe(parse_yaml("recipe.yaml", recipe_yaml(recipe)))
    assert again.clients.ranks == ranks


@pytest.mark.parametrize("ranks", [0, [], [0], {}, {0: 1.0}, {"four": 1.0}, {4: 0.0}, 1.5])
def test_ranks_that_make_no_sense_are_refused(ranks):
    with pytest.raises(RecipeError, match=r"clients\.ranks"):
        make_recipe(method="flexlora", clients__ranks=ranks)


def state_of_rank(rank: int) -> AdapterState:
    draw = np.random.default_rng(rank)
    factors = {
        m: Factors(
            draw.normal(size=(rank, s.d_in)).astype(np.float32),
            draw.normal(size=(s.d_out, rank)).astype(np.float32),
            2.0,
        )
        for m, s in SHAPE.modules.items()
    }
    return AdapterState(factors, {})


def test_a_limited_client_starts_from_the_first_directions():
    state = state_of_rank(3)
    model = GlobalModel(state, Base(), "adapter")
    starts = Starts(TestClients(model, ((0, 1, 2, 3),), limits={0: 1, 1: 5, 2: 1, 3: 3}))
    assert [starts.of(k).factors["q"].rank for k in range(4)] == [1, 3, 1, 3]
    np.testing.assert_array_equal(starts.of(0).factors["v"].a, state.factors["v"].a[:1])
    np.testing.assert_array_equal(starts.of(0).factors["v"].b, state.factors["v"].b[:, :1])
    assert starts.of(0) is starts.of(2)


def test_a_client_with_a_b_of_its_own_has_that_and_the_global_a():
    state = state_of_rank(2)
    own = {m: np.full((s.d_out, 2), 7, np.float32) for m, s in SHAPE.modules.items()}
    model = GlobalModel(state, Base(), "adapter")
    starts = Starts(TestClients(model, ((0, 1),), personal={1: own}))
    assert starts.of(0) is state
    np.testing.assert_array_equal(starts.of(1).factors["q"].b, own["q"])
    np.testing.assert_array_equal(starts.of(1).factors["q"].a, state.factors["q"].a)


@pytest.mark.parametrize(
    ("overrides", "path", "said"),
    [
        (
            {"clients__ranks": [1, 2]},
            "clients.ranks",
            "one of the rules product-svd, stacking, zero-pad",
        ),
        (
            {"aggregation__rule": "product-svd", "aggregation__server_optimizer": {"name": "adam"}},
            "aggregation.server_optimizer.name",
            "alternate, factor-average, freeze-a",
        ),
        ({"aggregation__rule": "share-a"}, "aggregation.rule", "to heating.rank, or another rule"),
        (
            {"aggregation__rule": "stacking", "annealing__acceptance": "metropolis"},
            "aggregation.rule",
            "use acceptance always or target",
        ),
        (
            {"aggregation__rule": "stacking", "annealing__allocation": "spectral"},
            "aggregation.rule",
            "use uniform",
        ),
        (
            {"clients__ranks": 2},
            "clients.ranks",
            "one of the rules product-svd, stacking, zero-pad",
        ),
        ({"method": "fedsa-lora", "annealing__allocation": "spectral"}, "rule", "use uniform"),
        (
            {
                "aggregation__rule": "zero-pad",
                "clients__ranks": 2,
                "annealing__cooling__residual": "fold",
            },
            "clients.ranks",
            "use residual drop",
        ),
        (
            {"method": "head-only", "adapter__train_head": False},
            "annealing.heating.rank",
            "rank 0 leaves nothing to train",
        ),
    ],
)
def test_what_a_rule_cannot_do_is_refused_with_the_reason(overrides, path, said):
    with pytest.raises(RecipeError) as raised:
        make_recipe(**overrides)
    assert path in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize("ranks", [3, [3, 5], {4: 0.5, 16: 0.5}])
def test_a_limit_that_is_never_reached_goes_with_any_rule_and_changes_nothing(ranks):
    for rule in ("factor-average", "freeze-a", "residual"):
        free = adapters(aggregation__rule=rule)
        limited = adapters(aggregation__rule=rule, clients__ranks=ranks)
        assert all(same(x, y, k) for x, y in zip(free, limited, strict=True) for k in "ab")
    make_recipe(method="head-only", clients__ranks=ranks)


def test_a_run_of_full_models_asks_nothing_of_the_rule():
    # A rule that sends nothing is for adapters alone: test_local_only.py.
    for rule in (name for name, entry in RULES.items() if not entry.alone):
        make_recipe(method="fedavg", aggregation__rule=rule, clients__ranks=[1, 2])


def test_a_base_without_merges_is_handed_on_as_it_is(tmp_path: Path):
    runs = progresses(method="fedlora")
    assert all(p.model.base == Base() for p in runs)


def test_a_rank_that_rises_needs_no_message_of_its_own(tmp_path: Path) -> None:
    recipe = make_recipe(
        aggregation__rule="freeze-a",
        clients__per_round=6,
        annealing__initiating__rounds=0,
        annealing__heating={"rounds": 3, "rank": 3, "shape": "ramp"},
    )
    found = rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory()).rounds
    # Ranks 1, 2, 3 while heating, then cuts to 2 and 1: a cut makes another A, 4 + 3 values a rank.
    assert found["rank"].tolist() == [1, 2, 3, 2, 1, 1]
    assert found["bytes_base"].tolist() == [6 * 41 * 4, 0, 0, 6 * 14 * 4, 6 * 7 * 4, 0]
