"""What every aggregation rule owes, and each rule against dense numpy."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfed_lora.aggregation.built_in.correct import RIDGE
from rayfed_lora.aggregation.means import ProductMean, TensorMean
from rayfed_lora.aggregation.rule import Rule
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, relative_error
from rayfed_lora.lora.stacked import StackedStates, named
from rayfed_lora.recipe.settings import Aggregation, ServerOptimizer
from rayfed_lora.types import AdapterState, Factors, Frozen

SHAPES = {"q": (6, 5), "v": (4, 7)}  # (d_out, d_in)
SCALES = {"q": 2.0, "v": 0.5}
Updates = list[tuple[float, AdapterState]]


def aggregated(
    rule: Rule,
    start: AdapterState,
    updates: Iterable[tuple[float, AdapterState]],
    step: OptimizerStep | None = None,
) -> Aggregate:
    """Return the next global state from (weight, state) of each client."""
    means = rule.means()
    for weight, update in updates:
        means.add(weight, update)
    return rule.aggregate(start, means, step or OptimizerStep(ServerOptimizer()))


@dataclass(frozen=True)
class Named:
    """A rule, in a round in which it freezes a factor or not."""

    name: str
    entry: Rule
    frozen: Frozen | None = None

    def __call__(self, start: AdapterState, updates: Updates, lr: float = 1.0) -> Aggregate:
        return aggregated(self.entry, start, updates, self.step(lr))

    def step(self, lr: float) -> OptimizerStep:
        return OptimizerStep(ServerOptimizer(lr=lr), frozen=self.frozen)

    def received(self, start: AdapterState, updates: Updates) -> Updates:
        """Give the clients the frozen factor of the start, which they could not change."""

        def kept(f: Factors, old: Factors) -> Factors:
            return replace(f, **({self.frozen: getattr(old, self.frozen)} if self.frozen else {}))

        return [
            (w, AdapterState({m: kept(f, start.factors[m]) for m, f in s.factors.items()}, s.dense))
            for w, s in updates
        ]


factor_average = Named("factor-average", RULES["factor-average"])
product_svd = Named("product-svd", RULES["product-svd"])
EXACT = ("stacking", "residual", "freeze-a", "alternate")


# Rules that look at each update on its own; the others take weighted means.
ROBUST = [name for name, entry in RULES.items() if "updates" in entry.kept]
TURNS = [
    (name, turn)
    for name in RULES
    # Without an aggregate there is nothing to compare: tests/unit/test_local_only.py.
    if name not in ROBUST and not RULES[name].alone
    for turn in range(1 + (name == "alternate"))
]


@pytest.fixture(params=TURNS)
def rule(request: pytest.FixtureRequest) -> Named:
    name, turn = request.param
    return Named(name, RULES[name], RULES[name].frozen(turn))


@pytest.fixture(params=[*TURNS, *((name, 0) for name in ROBUST)])
def any_rule(request: pytest.FixtureRequest) -> Named:
    name, turn = request.param
    return Named(name, RULES[name], RULES[name].frozen(turn))


@pytest.fixture(params=[name for name, entry in RULES.items() if entry.mixed_ranks])
def mixed_rule(request: pytest.FixtureRequest) -> Named:
    return Named(request.param, RULES[request.param])


def state(seed: int, rank: int = 3, head: bool = True) -> AdapterState:
    """A trained adapter with a head, whose arrays cannot be written to (as from Ray's store)."""
    draw = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        values = draw.normal(size=shape).astype(np.float32)
        values.flags.writeable = False
        return values

    factors = {
        m: Factors(array(rank, d_in), array(d_out, rank), SCALES[m])
        for m, (d_out, d_in) in SHAPES.items()
    }
    return AdapterState(
        factors, {"head.weight": array(3, 5), "head.bias": array(3)} if head else {}
    )


def clients(count: int, ranks: Sequence[int] = (3,)) -> Updates:
    return [(float(2 + k), state(100 + k, ranks[k % len(ranks)])) for k in range(count)]


def stream(updates: Updates) -> Iterator[tuple[float, AdapterState]]:
    """Hand the updates out once, as the executor does."""
    yield from updates


def dense(f: Factors) -> np.ndarray:
    return f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))


def dense_mean(updates: Updates, module: str) -> np.ndarray:
    total = sum(w for w, _ in updates)
    return sum(w / total * dense(s.factors[module]) for w, s in updates)


def plain_mean(updates: Updates, tensor: Callable[[AdapterState], np.ndarray]) -> np.ndarray:
    total = sum(w for w, _ in updates)
    return sum(w / total * tensor(s).astype(np.float64) for w, s in updates)


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def update_of(got: Aggregate, module: str) -> np.ndarray:
    """Return a module's update, what has been merged into the base included."""
    f, merged = got.state.factors.get(module), got.merged.get(module)
    total = np.zeros(SHAPES[module]) if f is None else dense(f)
    return total if merged is None else total + merged[0] @ merged[1]


def assert_same_update(got: Aggregate, expected: dict[str, np.ndarray], atol: float = 1e-5):
    for module in SHAPES:
        np.testing.assert_allclose(update_of(got, module), expected[module], atol=atol)


# What every rule owes.


def test_a_recipe_can_name_every_rule_and_describes_it():
    schema = Aggregation.model_json_schema()["properties"]["rule"]
    assert schema["enum"] == [rule.name for rule in RULES.values()] == list(RULES)
    for name, entry in RULES.items():
        assert Aggregation(rule=name).rule == name
        assert f"{name}: {entry.summary}" in schema["description"]


def test_every_rule_names_its_paper(rule):
    year_month, number = rule.entry.source.split(".")
    assert (len(year_month), len(number)) == (4, 5)
    assert (year_month + number).isdigit()


def test_equal_clients_give_their_update_back(rule):
    start = state(1)
    updates = rule.received(start, [(w, state(7)) for w in (1.0, 5.0, 2.5)])
    got = rule(start, updates)
    trained = updates[0][1]
    assert_same_update(got, {m: dense(f) for m, f in trained.factors.items()})
    for name, tensor in trained.dense.items():
        np.testing.assert_allclose(got.state.dense[name], tensor, rtol=1e-6)
    assert got.measure() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (3,), (2, 5), (1, 2, 3, 4, 5, 6, 7)])
def test_blocks_reduced_apart_and_joined_give_the_rule_on_all_clients(any_rule, cuts):
    start = state(1)
    updates = any_rule.received(start, clients(8))
    whole = any_rule(start, updates, 0.5)
    joined = any_rule.entry.means()
    for low, high in zip((0, *cuts), (*cuts, 8), strict=True):
        part = any_rule.entry.means()
        for weight, update in updates[low:high]:
            part.add(weight, update)
        # as it comes out of Ray's object store
        joined.join(pickle.loads(pickle.dumps(part)))
    got = any_rule.entry.aggregate(start, joined, any_rule.step(0.5))
    assert_same_update(got, {m: update_of(whole, m) for m in SHAPES})
    for name, tensor in whole.state.dense.items():
        np.testing.assert_allclose(got.state.dense[name], tensor, rtol=1e-6)
    assert got.measure() == pytest.approx(whole.measure(), abs=1e-9)


@pytest.mark.parametrize("left_out", [[], [0], [2, 5]])
def test_clients_of_one_stack_taken_in_at_once_give_the_rule_on_each(any_rule, left_out):
    start = state(1)
    updates = any_rule.received(start, clients(6))
    of_a_stack = stacked(updates, [updates[0][1]] * 6)
    kept = [k for k in range(6) if k not in left_out]
    each, at_once = any_rule.entry.means(), any_rule.entry.means()
    for k in kept:
        each.add(*updates[k])
    at_once.add_all([updates[k][0] for k in kept], of_a_stack.taken(kept))
    got, expected = (
        any_rule.entry.aggregate(start, m, any_rule.step(0.5)) for m in (at_once, each)
    )
    assert_same_update(got, {m: update_of(expected, m) for m in SHAPES}, atol=1e-6)
    for name, tensor in expected.state.dense.items():
        np.testing.assert_array_equal(got.state.dense[name], tensor)
    for name, tensor in each.tensors().items():
        np.testing.assert_array_equal(at_once.tensors()[name], tensor)


def test_clients_of_one_stack_may_have_ranks_of_their_own(mixed_rule):
    start = state(1)
    updates = clients(6, ranks=(3, 0, 2))
    expected = mixed_rule(start, updates, 0.5)
    means = mixed_rule.entry.means()
    weights, states = zip(*updates, strict=True)
    means.add_all(weights, stacked(updates, states))
    got = mixed_rule.entry.aggregate(start, means, mixed_rule.step(0.5))
    assert_same_update(got, {m: update_of(expected, m) for m in SHAPES}, atol=1e-6)


def stacked(updates: Updates, likes: Sequence[AdapterState]) -> StackedStates:
    """Return the same states as parts of one array, padded to the largest rank."""
    rank = max(f.rank for like in likes for f in like.factors.values())

    def padded(update: AdapterState) -> AdapterState:
        def of(f: Factors) -> Factors:
            more = rank - f.rank
            return Factors(
                np.pad(f.a, ((0, more), (0, 0))), np.pad(f.b, ((0, 0), (0, more))), f.scale
            )

        return replace(update, factors={m: of(f) for m, f in update.factors.items()})

    tensors = [named(padded(update)) for _, update in updates]
    rows = np.stack([np.concatenate([t.ravel() for t in each.values()]) for each in tensors])
    return StackedStates(rows, likes, {name: t.shape for name, t in tensors[0].items()})


def test_joining_changes_nothing_in_what_is_joined(any_rule):
    parts = [any_rule.entry.means() for _ in range(2)]
    for part, (weight, update) in zip(parts, clients(2), strict=True):
        part.add(weight, update)
    before = pickle.dumps(parts)
    joined = any_rule.entry.means()
    for part in (*parts, *parts):
        joined.join(part)
    assert pickle.dumps(parts) == before


def test_one_client_is_taken_as_it_is(rule):
    start = state(1)
    updates = rule.received(start, [(13.0, state(8))])
    got = rule(start, updates)
    assert_same_update(got, {m: dense(f) for m, f in updates[0][1].factors.items()})
    assert got.measure() == pytest.approx(0, abs=1e-6)


def test_dense_tensors_are_averaged_by_weight(rule):
    def with_head(value: float) -> AdapterState:
        return AdapterState({}, {"bias": np.full(2, value, np.float32)})

    # (3 * 2 + 1 * 6) / 4 = 3
    updates = [(3.0, with_head(2.0)), (1.0, with_head(6.0))]
    got = rule(with_head(1.0), updates)
    np.testing.assert_array_equal(got.state.dense["bias"], [3.0, 3.0])
    # a server step of 0.5 from 1 towards 3, and one of 2 beyond it
    for lr, expected in ((0.5, 2.0), (2.0, 5.0)):
        got = rule(with_head(1.0), updates, lr)
        np.testing.assert_array_equal(got.state.dense["bias"], [expected, expected])


def test_a_state_without_factors_is_plain_fedavg_and_has_no_aggregation_error(rule):
    updates = [(w, AdapterState({}, s.dense)) for w, s in clients(4)]
    got = rule(AdapterState({}, state(1).dense), updates)
    assert (got.measure(), got.merged, got.state.factors) == (None, {}, {})
    for name in ("head.weight", "head.bias"):
        expected = plain_mean(updates, lambda s, name=name: s.dense[name])
        np.testing.assert_allclose(got.state.dense[name], expected, atol=1e-6)


@pytest.mark.parametrize("lr", [0.25, 1.0, 1.5])
def test_clients_that_have_not_moved_leave_the_update_where_it_was(rule, lr):
    start = state(1)
    got = rule(start, [(2.0, start), (3.0, start)], lr)
    assert_same_update(got, {m: dense(f) for m, f in start.factors.items()})
    for name, tensor in start.dense.items():
        np.testing.assert_allclose(got.state.dense[name], tensor, rtol=1e-6)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_the_next_state_has_the_names_ranks_scales_and_precision_of_the_start(rule, lr):
    start = state(1)
    got = rule(start, rule.received(start, clients(3)), lr).state
    # FLoRA starts LoRA anew.
    assert list(got.factors) == ([] if rule.name == "stacking" else list(start.factors))
    assert list(got.dense) == list(start.dense)
    for module, f in got.factors.items():
        old = start.factors[module]
        assert (f.a.shape, f.b.shape, f.scale) == (old.a.shape, old.b.shape, old.scale)
        assert (f.a.dtype, f.b.dtype) == (np.float32, np.float32)
    for name, tensor in got.dense.items():
        assert (tensor.shape, tensor.dtype) == (start.dense[name].shape, np.float32)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_the_order_of_arrival_changes_nothing_but_rounding(any_rule, lr):
    start = state(1)
    updates = any_rule.received(start, clients(6))
    got = any_rule(start, updates, lr)
    turned = any_rule(start, updates[::-1], lr)
    assert_same_update(turned, {m: update_of(got, m) for m in SHAPES})
    for name, tensor in got.state.dense.items():
        np.testing.assert_allclose(turned.state.dense[name], tensor, atol=1e-6)
    assert turned.measure() == pytest.approx(got.measure(), abs=1e-6)


def test_the_unit_of_the_weights_does_not_matter(rule):
    start = state(1)
    updates = rule.received(start, clients(4))
    got = rule(start, updates)
    scaled = rule(start, [(w * 1000, s) for w, s in updates])
    assert_same_update(scaled, {m: update_of(got, m) for m in SHAPES})
    assert scaled.measure() == pytest.approx(got.measure(), abs=1e-6)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_no_input_is_written_to(rule, lr):
    start, updates = state(1), clients(3)
    states = [start, *(s for _, s in updates)]
    before = [
        [(f.a.copy(), f.b.copy()) for f in s.factors.values()]
        + [(t.copy(), t.copy()) for t in s.dense.values()]
        for s in states
    ]
    rule(start, updates, lr)
    for s, copies in zip(states, before, strict=True):
        now = [(f.a, f.b) for f in s.factors.values()] + [(t, t) for t in s.dense.values()]
        for (x, y), (x0, y0) in zip(now, copies, strict=True):
            np.testing.assert_array_equal(x, x0)
            np.testing.assert_array_equal(y, y0)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_rules_that_claim_to_be_exact_give_the_dense_mean(rule, lr):
    if rule.name not in EXACT:
        pytest.skip("not exact")
    start = state(1)
    updates = rule.received(start, clients(5))
    got = rule(start, updates, lr)
    expected = {
        m: (1 - lr) * dense(f) + lr * dense_mean(updates, m) for m, f in start.factors.items()
    }
    assert_same_update(got, expected)
    assert got.measure() == pytest.approx(0, abs=1e-6)


def test_the_error_is_the_distance_from_the_exact_mean_of_the_updates(rule):
    start = state(1)
    updates = rule.received(start, clients(5))
    got = rule(start, updates)
    exact = {m: dense_mean(updates, m) for m in SHAPES}
    apart = sum(np.linalg.norm(update_of(got, m) - exact[m]) ** 2 for m in SHAPES)
    size = sum(np.linalg.norm(exact[m]) ** 2 for m in SHAPES)
    assert got.measure() == pytest.approx(np.sqrt(apart / size), rel=1e-5, abs=1e-6)
    # five clients of rank 3 are no update of rank 3
    assert (got.measure() < 1e-6) == (rule.name in EXACT)
    assert rule.name in EXACT or got.measure() > 0.1


def test_an_adapter_of_rank_zero_has_nothing_to_average(rule):
    got = rule(state(1, rank=0), clients(3, ranks=[0]))
    for module, (d_out, d_in) in SHAPES.items():
        if rule.name != "stacking":
            assert got.state.factors[module].a.shape == (0, d_in)
            assert got.state.factors[module].b.shape == (d_out, 0)
    assert got.merged == {}
    assert got.measure() == 0.0


def test_a_rank_above_what_a_matrix_can_have_is_kept(rule):
    start = state(1, rank=9)
    updates = rule.received(start, [(1.0, state(9, rank=9)), (2.0, state(9, rank=9))])
    got = rule(start, updates)
    assert {f.rank for f in got.state.factors.values()} <= {9}
    trained = updates[0][1]
    assert_same_update(got, {m: dense(f) for m, f in trained.factors.items()}, atol=3e-5)
    # every direction can still be trained: no row of A is zero
    for f in got.state.factors.values():
        assert np.all(np.linalg.norm(f.a, axis=1) > 0)


def of_mixed_ranks() -> Updates:
    updates = clients(4, ranks=[1, 4, 0, 2])
    _, fourth = updates[3]
    rescaled = {m: Factors(f.a, f.b, 3.0) for m, f in fourth.factors.items()}
    return [*updates[:3], (4.5, AdapterState(rescaled, fourth.dense))]


def test_the_error_of_clients_of_different_ranks_is_measured(mixed_rule):
    updates, start = of_mixed_ranks(), state(1, rank=7)
    got = mixed_rule(start, updates)
    assert {f.rank for f in got.state.factors.values()} <= {7}
    exact = {m: dense_mean(updates, m) for m in SHAPES}
    apart = sum(np.linalg.norm(update_of(got, m) - exact[m]) ** 2 for m in SHAPES)
    size = sum(np.linalg.norm(exact[m]) ** 2 for m in SHAPES)
    assert got.measure() == pytest.approx(np.sqrt(apart / size), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["product-svd", "stacking"])
def test_clients_of_different_ranks_and_scales_are_averaged_exactly(name):
    updates = of_mixed_ranks()
    # room for the 1 + 4 + 0 + 2 directions there are
    got = Named(name, RULES[name])(state(1, rank=7), updates)
    assert_same_update(got, {m: dense_mean(updates, m) for m in SHAPES})
    assert got.measure() == pytest.approx(0, abs=1e-6)


# factor-average: the means of A and of B apart.


def test_factor_average_is_the_mean_of_a_and_the_mean_of_b():
    updates = clients(5)
    got = factor_average(state(1), updates).state
    for m in SHAPES:
        mean_a = plain_mean(updates, lambda s, m=m: s.factors[m].a)
        mean_b = plain_mean(updates, lambda s, m=m: s.factors[m].b)
        np.testing.assert_allclose(got.factors[m].a, mean_a, atol=1e-6)
        np.testing.assert_allclose(got.factors[m].b, mean_b, atol=1e-6)


@pytest.mark.parametrize("lr", [0.5, 1.5])
def test_factor_average_steps_each_factor_towards_its_mean(lr):
    start, updates = state(1), clients(3)
    got = factor_average(start, updates, lr).state
    for m, old in start.factors.items():
        mean_a = plain_mean(updates, lambda s, m=m: s.factors[m].a)
        mean_b = plain_mean(updates, lambda s, m=m: s.factors[m].b)
        np.testing.assert_allclose(got.factors[m].a, (1 - lr) * old.a + lr * mean_a, atol=1e-6)
        np.testing.assert_allclose(got.factors[m].b, (1 - lr) * old.b + lr * mean_b, atol=1e-6)


def scalar(a: float, b: float) -> AdapterState:
    one = Factors(np.full((1, 1), a, np.float32), np.full((1, 1), b, np.float32), 1.0)
    return AdapterState({"q": one}, {})


def test_factor_average_is_biased_by_the_covariance_of_a_and_b():
    # clients (A, B) = (1, 1) and (3, 3): means 2 * 2 = 4, mean of products (1 + 9) / 2 = 5
    got = factor_average(scalar(0, 0), [(1.0, scalar(1, 1)), (1.0, scalar(3, 3))])
    assert dense(got.state.factors["q"]).item() == 4.0
    assert got.measure() == pytest.approx(1 / 5)


def test_factor_average_does_not_average_factors_of_different_ranks():
    with pytest.raises(ValueError, match=r"rank|shape"):
        factor_average(state(1), [(1.0, state(2)), (1.0, state(3, rank=1))])


# product-svd: the exact mean of the products, cut back to the rank.


@pytest.mark.parametrize("count", [2, 5, 30])
def test_product_svd_is_the_dense_mean_cut_by_the_dense_svd(count):
    updates = clients(count)
    got = product_svd(state(1), updates)
    assert_same_update(got, {m: best_of_rank(dense_mean(updates, m), 3) for m in SHAPES})


@pytest.mark.parametrize("lr", [0.5, 1.5])
def test_product_svd_steps_the_update_and_then_cuts_it(lr):
    start, updates = state(1), clients(4)
    got = product_svd(start, updates, lr)
    expected = {
        m: best_of_rank((1 - lr) * dense(f) + lr * dense_mean(updates, m), 3)
        for m, f in start.factors.items()
    }
    assert_same_update(got, expected)


def test_product_svd_cuts_to_the_rank_of_the_start_however_many_ranks_the_clients_have():
    updates = clients(3, ranks=[4, 2, 3])
    got = product_svd(state(1, rank=2), updates)
    assert_same_update(got, {m: best_of_rank(dense_mean(updates, m), 2) for m in SHAPES})


def two_axes() -> tuple[AdapterState, Updates]:
    """A start of D = 0 and rank 1, and clients whose mean update is diag(2, 1)."""

    def axis(i: int, value: float) -> AdapterState:
        a, b = np.zeros((1, 2), np.float32), np.zeros((2, 1), np.float32)
        a[0, i], b[i, 0] = 1.0, value
        return AdapterState({"q": Factors(a, b, 1.0)}, {})

    return axis(0, 0.0), [(1.0, axis(0, 4.0)), (1.0, axis(1, 2.0))]


def test_the_error_of_product_svd_is_what_it_cuts_off():
    start, updates = two_axes()
    # diag(2, 1) without its 1: 1 / sqrt(4 + 1)
    assert product_svd(start, updates).measure() == pytest.approx(1 / np.sqrt(5))


def test_the_error_of_product_svd_is_what_it_cuts_off_with_a_server_step_too():
    start, updates = two_axes()
    # half a step from 0: diag(1, 0.5) without its 0.5 is the same share
    assert product_svd(start, updates, 0.5).measure() == pytest.approx(1 / np.sqrt(5))


# freeze-a and alternate: a factor that nobody trained stays bit for bit.


@pytest.mark.parametrize(("name", "turn", "kept"), [("freeze-a", 5, "a"), ("alternate", 1, "b")])
def test_a_frozen_factor_is_not_touched(name, turn, kept):
    start, entry = state(1), RULES[name]
    frozen = Named(name, entry, entry.frozen(turn))
    got = frozen(start, frozen.received(start, clients(7)), 0.7).state
    for m, f in start.factors.items():
        np.testing.assert_array_equal(getattr(got.factors[m], kept), getattr(f, kept))


def test_alternate_begins_with_b_since_a_has_no_gradient_while_b_is_zero():
    turns = [RULES["alternate"].frozen(turn) for turn in range(4)]
    assert turns == ["a", "b", "a", "b"]
    assert [RULES["freeze-a"].frozen(turn) for turn in range(3)] == ["a", "a", "a"]
    assert RULES["factor-average"].frozen(0) is None


# residual and stacking: what goes into the base.


def test_residual_keeps_the_averages_and_merges_what_they_lack():
    start, updates = state(1), clients(3)
    got = aggregated(RULES["residual"], start, stream(updates))
    averages = factor_average(start, updates).state
    for m, f in averages.factors.items():
        np.testing.assert_array_equal(got.state.factors[m].a, f.a)
        np.testing.assert_array_equal(got.state.factors[m].b, f.b)
        b, a = got.merged[m]
        np.testing.assert_allclose(b @ a, dense_mean(updates, m) - dense(f), atol=1e-6)


def test_stacking_merges_all_of_the_mean_and_leaves_no_adapter():
    updates = clients(4, ranks=[1, 3])
    got = aggregated(RULES["stacking"], state(1), stream(updates))
    assert got.state.factors == {}
    for m in SHAPES:
        b, a = got.merged[m]
        np.testing.assert_allclose(b @ a, dense_mean(updates, m), atol=1e-6)


# zero-pad: weights by the size of a client's update over all modules.


def test_zero_pad_pads_to_the_largest_rank_and_weights_by_update_size():
    start, updates = state(1, rank=4), clients(3, ranks=[2, 3])
    got = aggregated(RULES["zero-pad"], start, stream(updates)).state
    sizes = [np.sqrt(sum(np.sum(dense(f) ** 2) for f in s.factors.values())) for _, s in updates]
    for m, old in start.factors.items():
        a, b = np.zeros((3, old.a.shape[1])), np.zeros((old.b.shape[0], 3))
        for size, (_, s) in zip(sizes, updates, strict=True):
            f = s.factors[m]
            a[: f.rank] += size / sum(sizes) * f.a
            b[:, : f.rank] += size / sum(sizes) * f.b
        np.testing.assert_allclose(got.factors[m].a[:3], a, atol=1e-6)
        np.testing.assert_allclose(got.factors[m].b[:, :3], b, atol=1e-6)
        # Nobody trained the fourth direction.
        np.testing.assert_array_equal(got.factors[m].a[3], old.a[3])
        np.testing.assert_array_equal(got.factors[m].b[:, 3], old.b[:, 3])


def test_zero_pad_leaves_the_factors_where_nobody_has_moved_from_zero():
    start = state(1)
    still = {m: Factors(f.a, np.zeros_like(f.b), f.scale) for m, f in start.factors.items()}
    start = AdapterState(still, start.dense)
    got = aggregated(RULES["zero-pad"], start, stream([(1.0, start), (2.0, start)])).state
    for m, f in start.factors.items():
        np.testing.assert_array_equal(got.factors[m].a, f.a)


# correct: B is the best for the averaged A, but for the ridge.


def test_correct_keeps_the_mean_of_a_and_solves_the_ridge_for_b():
    start, updates = state(1), clients(4)
    got = aggregated(RULES["correct"], start, stream(updates)).state
    for m, old in factor_average(start, updates).state.factors.items():
        a, b, s = old.a.astype(float), old.b.astype(float), old.scale
        ridge = RIDGE * np.trace(a @ a.T) / len(a)
        # The rows of B are ridge regressions: stack sqrt(ridge) I below A^T.
        above = np.concatenate([a.T, np.sqrt(ridge) * np.eye(len(a))])
        lacking = dense_mean(updates, m) / s - b @ a
        right = np.concatenate([lacking.T, np.zeros((len(a), len(b)))])
        delta = np.linalg.lstsq(above, right, rcond=None)[0].T
        np.testing.assert_array_equal(got.factors[m].a, old.a)
        np.testing.assert_allclose(got.factors[m].b, b + delta, atol=1e-5)


def test_correct_is_nearer_to_the_exact_mean_than_the_average_of_factors():
    start, updates = state(1), clients(6)
    corrected = aggregated(RULES["correct"], start, stream(updates)).measure()
    assert corrected < 0.9 * factor_average(start, updates).measure()


# The server's optimisers: arXiv:2003.00295, Algorithm 2, and FedAvgM.


def one(value: float) -> AdapterState:
    return AdapterState({}, {"x": np.array([value], np.float32)})


def played(deltas: Sequence[float], **settings: object) -> list[float]:
    """Return where the server is after each round whose clients move by a delta from it."""
    optimizer = ServerOptimizer(**settings)
    entry, moments, x, path = RULES["factor-average"], {}, 1.0, []
    for delta in deltas:
        step = OptimizerStep(optimizer, moments)
        got = aggregated(entry, one(x), stream([(2.0, one(x + delta))]), step)
        moments, x = step.moments, float(got.state.dense["x"][0])
        path.append(x)
    return path


def test_momentum_adds_up_what_came_before():
    # m: 1, 0.5 * 1 + 2 = 2.5; x: 1 + 0.1 * 1, + 0.1 * 2.5
    assert played([1.0, 2.0], name="momentum", lr=0.1, momentum=0.5) == pytest.approx([1.1, 1.35])


def test_adam_divides_by_the_root_of_the_mean_square():
    settings = {"beta1": 0.5, "beta2": 0.75, "tau": 0.5}
    path = played([1.0, 2.0], name="adam", lr=0.1, **settings)
    m1, v1 = 0.5, 0.75 * 0.25 + 0.25
    m2, v2 = 0.5 * m1 + 1.0, 0.75 * v1 + 0.25 * 4
    first = 1 + 0.1 * m1 / (np.sqrt(v1) + 0.5)
    assert path == pytest.approx([first, first + 0.1 * m2 / (np.sqrt(v2) + 0.5)])


def test_yogi_moves_the_mean_square_by_a_step_of_known_size():
    settings = {"beta1": 0.5, "beta2": 0.75, "tau": 0.5}
    path = played([1.0, 0.1], name="yogi", lr=0.1, **settings)
    m1, v1 = 0.5, 0.25 + 0.25 * 1.0
    m2, v2 = 0.25 + 0.05, v1 - 0.25 * 0.01
    first = 1 + 0.1 * m1 / (np.sqrt(v1) + 0.5)
    assert path == pytest.approx([first, first + 0.1 * m2 / (np.sqrt(v2) + 0.5)])


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_server_optimisers_leave_a_frozen_factor_alone_whatever_they_remember(name):
    start, entry = state(1), RULES["alternate"]
    optimizer = ServerOptimizer(name=name, lr=0.1)
    first = OptimizerStep(optimizer, frozen="a")
    after = aggregated(entry, start, stream(clients(3)), first).state
    second = OptimizerStep(optimizer, first.moments, frozen="b")
    again = aggregated(entry, after, stream(clients(3)), second).state
    for m, f in after.factors.items():
        np.testing.assert_array_equal(f.a, start.factors[m].a)
        np.testing.assert_array_equal(again.factors[m].b, f.b)
        assert not np.array_equal(again.factors[m].a, f.a)


def test_moments_of_another_shape_are_not_taken_up():
    optimizer = ServerOptimizer(name="momentum", lr=1.0)
    step = OptimizerStep(optimizer, {"x": (np.full(3, 9.0),)})
    got = aggregated(RULES["factor-average"], one(1.0), stream([(1.0, one(3.0))]), step)
    assert got.state.dense["x"].tolist() == [3.0]


# The error, and the two running means.


def test_the_error_of_updates_that_are_all_zero_is_zero():
    zero = (np.zeros((2, 1)), np.ones((1, 3)))
    assert relative_error({"q": zero}, {"q": zero}) == 0.0


def test_an_update_where_the_exact_mean_vanishes_is_not_called_exact():
    # (A, B) = (1, 1) and (2, -1/2): products 1 and -1 cancel, the means give 1.5 * 0.25 = 0.375
    updates = [(1.0, scalar(1, 1)), (1.0, scalar(2, -0.5))]
    got = factor_average(scalar(0, 0), updates)
    assert dense(got.state.factors["q"]).item() == 0.375
    assert got.measure() != 0.0


def test_the_error_is_taken_over_all_modules_together():
    one = np.ones((1, 1))
    used = {"q": (3 * one, one), "v": (2 * one, one)}
    exact = {"q": (3 * one, one), "v": (6 * one, -one)}
    # apart: 0 and 8; exact: 3 and 6
    assert relative_error(used, exact) == pytest.approx(8 / np.sqrt(9 + 36))


@settings(max_examples=30)
@given(
    count=st.integers(1, 40),
    rank=st.integers(0, 6),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_product_mean_is_the_dense_mean_for_any_number_of_clients(count, rank, size, seed):
    draw = np.random.default_rng(seed)
    mean, total, weights = ProductMean(), np.zeros(size), 0.0
    for _ in range(count):
        weight = float(draw.integers(1, 50))
        a = draw.normal(size=(rank, size[1])).astype(np.float32)
        b = draw.normal(size=(size[0], rank)).astype(np.float32)
        mean.add(weight, Factors(a, b, 2.0))
        total += weight * 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
        weights += weight
        if draw.random() < 0.3:
            mean.pack()
    b_mean, a_mean = mean.mean()
    np.testing.assert_allclose(b_mean @ a_mean, total / weights, atol=1e-11)


def test_a_product_mean_of_five_hundred_clients_holds_no_more_than_a_few_and_is_exact():
    draw = np.random.default_rng(3)
    d_out, d_in, rank, widest = 12, 10, 4, 0
    mean, total = ProductMean(), np.zeros((d_out, d_in))
    for k in range(500):
        a = draw.normal(size=(rank, d_in)).astype(np.float32)
        b = draw.normal(size=(d_out, rank)).astype(np.float32)
        mean.add(k + 1, Factors(a, b, 0.5))
        total += (k + 1) * 0.5 * (b.astype(np.float64) @ a.astype(np.float64))
        held_b, held_a = mean.mean()
        widest = max(widest, held_b.shape[1], held_a.shape[0])
    assert widest <= 2 * min(d_out, d_in) + rank
    np.testing.assert_allclose(held_b @ held_a, total / (500 * 501 / 2), atol=1e-12)


def test_a_product_mean_of_clients_of_rank_0_holds_no_more_for_more_of_them():
    none = Factors(np.zeros((0, 5), np.float32), np.zeros((4, 0), np.float32), 1.0)
    one = Factors(np.ones((1, 5), np.float32), np.ones((4, 1), np.float32), 1.0)
    few, many = ProductMean(), ProductMean()
    few.add(1, none)
    for _ in range(100):
        many.add(1, none)
        many.join(few)
    assert len(pickle.dumps(many)) == len(pickle.dumps(few))
    many.add(200, one)
    b, a = many.mean()
    np.testing.assert_array_equal(b @ a, np.full((4, 5), 0.5))


def test_a_tensor_mean_is_taken_in_double_precision():
    # in float32 16777216 + 1 is 16777216, and the mean would lose the ones
    mean = TensorMean()
    mean.add(1.0, {"x": np.array([16777216.0], np.float32)})
    for _ in range(3):
        mean.add(1.0, {"x": np.array([1.0], np.float32)})
    np.testing.assert_array_equal(mean.mean()["x"], [(16777216 + 3) / 4])


def test_a_tensor_mean_of_a_large_model_joined_from_two_is_the_mean_of_all():
    draw = np.random.default_rng(4)
    sent = [{"x": draw.normal(size=200_003).astype(np.float32)} for _ in range(5)]
    left, right = TensorMean(), TensorMean()
    for k, tensors in enumerate(sent):
        (left if k < 2 else right).add(k + 1, tensors)
    held = right.mean()["x"].copy()
    left.join(right)
    expected = np.average([t["x"].astype(np.float64) for t in sent], 0, np.arange(1, 6))
    np.testing.assert_allclose(left.mean()["x"], expected, rtol=0, atol=1e-14)
    left.add(6, sent[0])
    np.testing.assert_array_equal(right.mean()["x"], held)


@pytest.mark.parametrize(("lr", "clients", "times"), [(1.0, 3, 2), (0.5, 3, 3), (0.5, 1, 1)])
def test_what_averages_lack_has_the_rank_that_is_billed(lr, clients, times):
    draw, rank = np.random.default_rng(5), 2

    def state() -> AdapterState:
        a = draw.normal(size=(rank, 20)).astype(np.float32)
        b = draw.normal(size=(24, rank)).astype(np.float32)
        return AdapterState({"q": Factors(a, b, 1.0)}, {})

    start, means = state(), RULES["residual"].means()
    for _ in range(clients):
        means.add(1.0, state())
    step = OptimizerStep(ServerOptimizer(lr=lr), {}, None)
    b, a = RULES["residual"].aggregate(start, means, step).merged["q"]
    assert np.linalg.matrix_rank(b @ a, tol=1e-5) == times * rank
