"""The resident model: what is loaded is what computes, trains and is read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import ViTConfig, ViTForImageClassification

from rayfed_lora.aggregation.step import product
from rayfed_lora.federation import transitions
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.shapes import adapted_modules
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.types import AdapterState, Base, Factors, Frozen, GlobalModel

CLASSES = 3
IMAGES = torch.from_numpy(np.random.default_rng(7).normal(size=(5, 1, 8, 8)).astype(np.float32))
LABELS = torch.tensor([0, 1, 2, 1, 0])
# Two layers; fc1 is 24 x 16, the others are 16 x 16.
TARGETS = ["q_proj", "v_proj", "fc1"]


def build() -> nn.Module:
    """Return the source model: the same weights at each call."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTForImageClassification(config).eval()


def adapter(**values: Any) -> Adapter:
    return Adapter.model_validate({"target_modules": TARGETS, **values})


NAMES = adapted_modules(build(), adapter())
HEAD = ("classifier.weight", "classifier.bias")
RANKS = range(1, len(NAMES) + 1)


def factors(name: str, rank: int, rng: np.random.Generator, scale: float) -> Factors:
    d_out, d_in = build().get_submodule(name).weight.shape
    a = rng.normal(size=(rank, d_in)).astype(np.float32)
    b = rng.normal(size=(d_out, rank)).astype(np.float32)
    return Factors(a, b, scale)


def merged(base: Base, *folds: Mapping[str, Factors]) -> Base:
    """Return the base with some updates in it."""
    for added in folds:
        base = transitions.with_updates(base, {name: product(f) for name, f in added.items()})
    return base


def fold(ranks: Mapping[str, int], seed: int, scale: float = 0.5) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {name: factors(name, rank, rng, scale) for name, rank in ranks.items()}


def state(ranks: Sequence[int], seed: int = 1, scale: float = 0.5) -> AdapterState:
    """Return random factors of the given ranks, module by module, and a random head."""
    rng = np.random.default_rng(seed)
    found = {n: factors(n, r, rng, scale) for n, r in zip(NAMES, ranks, strict=True)}
    shapes = {"classifier.weight": (CLASSES, 16), "classifier.bias": (CLASSES,)}
    head = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    return AdapterState(found, head)


def everything(seed: int) -> dict[str, np.ndarray]:
    """Return random values for every weight of the model."""
    rng = np.random.default_rng(seed)
    return {n: (p.detach().numpy() + rng.normal(0, 0.1, p.shape)).astype(np.float32)
            for n, p in build().named_parameters()}  # fmt: skip


def dense_logits(
    weights: Mapping[str, np.ndarray], updates: Sequence[Mapping[str, Factors]]
) -> np.ndarray:
    """Return the logits in float64 of the plain model with W + sum of scale * B @ A in it."""
    dense = {n: p.detach().double() for n, p in build().named_parameters()}
    dense |= {name: torch.tensor(w, dtype=torch.float64) for name, w in weights.items()}
    for update in updates:
        for name, f in update.items():
            product = f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))
            dense[f"{name}.weight"] = dense[f"{name}.weight"] + torch.tensor(product)
    with torch.no_grad():
        return functional_call(build().double(), dense, (IMAGES.double(),)).logits.numpy()


def logits(model: AdaptedModel) -> np.ndarray:
    model.net.eval()
    with torch.no_grad():
        return model.net(IMAGES).logits.numpy()


def backward(model: AdaptedModel, given: AdapterState) -> set[str]:
    """Take a gradient; return the names of all tensors that have one."""
    nn.functional.cross_entropy(model.net(IMAGES).logits, LABELS).backward()
    named = {**dict(model.net.named_parameters()), **model.parameters(given)}
    return {name for name, tensor in named.items() if tensor.grad is not None}


def assert_same_bits(one: AdapterState, other: AdapterState) -> None:
    assert list(one.factors) == list(other.factors)
    assert list(one.dense) == list(other.dense)
    for name, f in one.factors.items():
        g = other.factors[name]
        assert f.scale == g.scale
        np.testing.assert_array_equal(f.a, g.a)
        np.testing.assert_array_equal(f.b, g.b)
    for name, tensor in one.dense.items():
        np.testing.assert_array_equal(tensor, other.dense[name])


def read(model: AdaptedModel, like: AdapterState) -> AdapterState:
    """Return the weights of the one client that is loaded."""
    return model.read_from([like], 0)[0]


def weights_of(model: AdaptedModel) -> dict[str, np.ndarray]:
    return model.tensors("full")


def test_a_loaded_state_is_read_back_bit_for_bit() -> None:
    model, given = AdaptedModel(build(), adapter()), state([4, 3, 2, 1, 0, 5])
    model.load([given], Base(), "adapter")
    assert_same_bits(read(model, given), given)


def test_the_model_computes_the_base_plus_scaled_products() -> None:
    model, given = AdaptedModel(build(), adapter()), state([4, 3, 2, 1, 0, 5])
    model.load([given], Base(), "adapter")
    expected = dense_logits(given.dense, [given.factors])
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)
    # The factors matter: without them the logits are others by far more than the tolerance.
    assert np.abs(expected - dense_logits(given.dense, [])).max() > 0.1


def test_ranks_and_scales_can_be_others_at_each_load_down_to_none_and_up_again() -> None:
    model = AdaptedModel(build(), adapter())
    for seed, ranks in enumerate(
        [[4] * 6, [1] * 6, [0] * 6, [0, 16, 3, 0, 2, 1], [0] * 6, [2] * 6]
    ):
        given = state(ranks, seed=seed, scale=1.0 / (seed + 1))
        model.load([given], Base(), "adapter")
        assert_same_bits(read(model, given), given)
        expected = dense_logits(given.dense, [given.factors])
        np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_module_that_the_state_lacks_has_no_update() -> None:
    model, whole = AdaptedModel(build(), adapter()), state([2] * 6)
    model.load([whole], Base(), "adapter")
    part = AdapterState({NAMES[0]: whole.factors[NAMES[0]]}, whole.dense)
    model.load([part], Base(), "adapter")
    expected = dense_logits(part.dense, [part.factors])
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_full_round_sets_and_reads_every_weight_and_has_no_update() -> None:
    model, before = AdaptedModel(build(), adapter()), state([2] * 6)
    model.load([before], Base(), "adapter")
    given = AdapterState({}, everything(seed=3))
    model.load([given], Base(), "full")
    assert_same_bits(read(model, given), given)
    np.testing.assert_allclose(logits(model), dense_logits(given.dense, []), rtol=1e-4, atol=1e-5)


def test_the_tensors_of_a_round_have_the_plain_models_names_and_values() -> None:
    model = AdaptedModel(build(), adapter())
    plain = {name: p.detach().numpy() for name, p in build().named_parameters()}
    found = model.tensors("full")
    assert list(found) == list(plain)
    for name, tensor in plain.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert tuple(model.tensors("adapter")) == HEAD


def test_tensors_handed_out_do_not_change_when_the_model_does() -> None:
    model = AdaptedModel(build(), adapter())
    head = model.tensors("adapter")["classifier.weight"]
    before = head.copy()
    model.load([state([1] * 6)], Base(), "adapter")
    np.testing.assert_array_equal(head, before)
    assert not np.array_equal(model.tensors("adapter")["classifier.weight"], before)


def test_read_only_arrays_of_the_object_store_can_be_loaded() -> None:
    given = state([2] * 6)
    added = fold({NAMES[0]: 2}, seed=5)
    base = merged(Base(1, {n: w for n, w in everything(seed=4).items() if n not in HEAD}), added)
    arrays = [*given.dense.values(), *(base.tensors or {}).values(), *base.merged.values()]
    for f in given.factors.values():
        arrays += [f.a, f.b]
    for array in arrays:
        array.flags.writeable = False
    model = AdaptedModel(build(), adapter())
    model.load([given], base, "adapter")
    assert_same_bits(read(model, given), given)


def test_a_replaced_base_and_its_folds_compute_as_the_dense_sum() -> None:
    tensors = {n: w for n, w in everything(seed=3).items() if n not in HEAD}
    first, second = fold({NAMES[0]: 2, NAMES[2]: 3}, seed=5), fold({NAMES[0]: 1}, seed=6)
    model, given = AdaptedModel(build(), adapter()), state([2, 0, 1, 3, 1, 2])
    model.load([given], Base(1, tensors), "adapter")
    expected = dense_logits({**tensors, **given.dense}, [given.factors])
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.load([given], merged(Base(1, tensors), first, second), "adapter")
    expected = dense_logits({**tensors, **given.dense}, [first, second, given.factors])
    np.testing.assert_allclose(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_what_is_loaded_does_not_depend_on_the_bases_loaded_before() -> None:
    folds = [fold({NAMES[0]: 2, NAMES[5]: 1}, seed=s) for s in range(3)]
    given = state([1] * 6)
    gradual, at_once = AdaptedModel(build(), adapter()), AdaptedModel(build(), adapter())
    for count in (0, 1, 2, 3, 1, 3):
        gradual.load([given], merged(Base(), *folds[:count]), "adapter")
    at_once.load([given], merged(Base(), *folds), "adapter")
    for name, tensor in weights_of(at_once).items():
        np.testing.assert_array_equal(weights_of(gradual)[name], tensor)
    changed = f"{NAMES[0]}.weight"
    assert not np.array_equal(weights_of(at_once)[changed], build().state_dict()[changed].numpy())


@pytest.mark.parametrize("replaced", [False, True], ids=["source", "replaced"])
def test_a_base_is_set_anew_after_a_full_round(replaced: bool) -> None:
    tensors = {n: w for n, w in everything(seed=3).items() if n not in HEAD} if replaced else None
    base = merged(Base(int(replaced), tensors), fold({NAMES[0]: 2}, seed=5))
    given = state([1] * 6)
    model, fresh = AdaptedModel(build(), adapter()), AdaptedModel(build(), adapter())
    model.load([given], base, "adapter")
    model.load([AdapterState({}, everything(seed=8))], Base(), "full")
    model.load([given], base, "adapter")
    fresh.load([given], base, "adapter")
    for name, tensor in weights_of(fresh).items():
        np.testing.assert_array_equal(weights_of(model)[name], tensor)


def test_adapter_rounds_train_the_factors_and_the_head_and_nothing_else() -> None:
    model, given = AdaptedModel(build(), adapter()), state([1, 0, 2, 1, 0, 1])
    model.load([given], Base(), "adapter")
    with_factors = [n for n in NAMES if given.factors[n].rank > 0]
    expected = {f"{n}.lora_{part}" for n in with_factors for part in "AB"}
    assert backward(model, given) == expected | set(HEAD)
    assert list(model.parameters(given)) == [
        *HEAD,
        *(f"{n}.lora_{part}" for n in with_factors for part in "AB"),
    ]


def test_the_gradients_of_a_full_round_are_not_kept() -> None:
    model, given = AdaptedModel(build(), adapter()), state([1] * 6)
    everything_trained = AdapterState({}, everything(seed=3))
    model.load([everything_trained], Base(), "full")
    backward(model, everything_trained)
    model.load([given], Base(), "adapter")
    assert backward(model, given) == {f"{n}.lora_{part}" for n in NAMES for part in "AB"} | {*HEAD}


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    model = AdaptedModel(build(), adapter(train_head=False))
    given = AdapterState(state([1] * 6).factors, {})
    model.load([given], Base(), "adapter")
    assert backward(model, given) == {f"{n}.lora_{part}" for n in NAMES for part in "AB"}


def test_full_rounds_train_every_weight_of_the_plain_model() -> None:
    model = AdaptedModel(build(), adapter())
    model.load([state([1] * 6)], Base(), "adapter")
    given = AdapterState({}, everything(seed=3))
    model.load([given], Base(), "full")
    assert len(backward(model, given)) == len(list(build().named_parameters()))
    assert list(model.parameters(given)) == [name for name, _ in build().named_parameters()]


class Counted(AdaptedModel):
    """Counts how often it is loaded."""

    loads = 0

    def load(self, *args: Any, **named: Any) -> None:
        self.loads += 1
        super().load(*args, **named)


def test_what_is_shown_again_is_loaded_again_only_if_it_has_to_be() -> None:
    model, expected = Counted(build(), adapter()), AdaptedModel(build(), adapter())
    one, other = (state(RANKS, seed) for seed in (1, 5))
    folded = merged(Base(), fold({NAMES[0]: 2}, seed=3))

    def loads_of(shown: AdapterState, base: Base) -> int:
        before = model.loads
        model.show(GlobalModel(shown, base, "adapter"))
        expected.load([shown], base, "adapter")
        np.testing.assert_array_equal(logits(model), logits(expected))
        return model.loads - before

    found = [loads_of(*shown) for shown in ((one, Base()), (one, Base()), (other, Base()))]
    found += [loads_of(other, folded), loads_of(other, folded)]
    assert found == [1, 0, 1, 1, 0]
    # What was trained in between has other weights now.
    model.load([other], folded, "adapter")
    for parameter in model.parameters(other).values():
        parameter.data.add_(1.0)
    assert loads_of(other, folded) == 1


def test_a_load_is_that_of_a_fresh_model_whatever_was_trained_before() -> None:
    model = AdaptedModel(build(), adapter())
    one, other = (state(RANKS, seed) for seed in (1, 5))

    def loaded(*states: AdapterState, frozen: Frozen | None = None) -> None:
        model.load(states, Base(), "adapter", frozen)
        fresh = AdaptedModel(build(), adapter())
        fresh.load(states, Base(), "adapter", frozen)
        np.testing.assert_array_equal(logits(model), logits(fresh))
        for found, given in zip(model.read_from(states, 0), states, strict=True):
            assert_same_bits(found, given)
        parameters = model.parameters(one)
        assert parameters.keys() == fresh.parameters(one).keys()
        # What training does to them.
        for parameter in parameters.values():
            assert parameter.requires_grad and parameter.grad is None
            parameter.data.add_(1.0)
            parameter.grad = torch.ones_like(parameter)

    loaded(*[one] * 5)
    loaded(one)
    loaded(*[other] * 5)
    loaded(*[one] * 5, frozen="a")
    loaded(*[state([*reversed(RANKS)])] * 5)
    loaded(one, other, one, other, one)
    model.load([AdapterState({}, everything(3))], Base(), "full")
    loaded(*[one] * 5)
    model.keep(2)
    loaded(*[other] * 5)


def test_the_clients_that_stay_in_a_group_keep_their_weights() -> None:
    model, states = AdaptedModel(build(), adapter()), [state(RANKS, seed) for seed in range(4)]
    model.load(states, Base(), "adapter")
    for found, given in zip(model.read_from(states[2:], 2), states[2:], strict=True):
        assert_same_bits(found, given)
    model.keep(2)
    for found, given in zip(model.read_from(states[:2], 0), states[:2], strict=True):
        assert_same_bits(found, given)
