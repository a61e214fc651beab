"""Codecs, attacks and clipping against arithmetic by hand."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from rayfed_lora.errors import RunError
from rayfed_lora.lora.stacked import A, B, StackedStates
from rayfed_lora.plugins import update
from rayfed_lora.types import AdapterState, Factors
from rayfed_lora.wire.update import UpdateMethod
from rayfed_lora.wire.updates import ATTACKS, CODECS, UPDATES
from rayfed_lora.wire.upload import Named, Upload, clipped, downloaded, malicious_clients, uploaded

SHAPES = {"head": (2, 3), "A of q": (2, 50), "B of q": (40, 2), "bias": (7,)}


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


def tensors(clients: int = 3, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal((clients, *s)).astype(np.float32) for n, s in SHAPES.items()}


def seen_by(method: UpdateMethod, given: dict[str, np.ndarray], seed: int = 0) -> dict:
    count = len(next(iter(given.values())))
    return dict(method.seen(given, rngs(count, seed), 0, range(count)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # 6 + 100 + 80 + 7 = 193 values.
        ("float32", {}, 193 * 4),
        ("float16", {}, 193 * 2),
        ("bfloat16", {}, 193 * 2),
        # Rows: 2 of the head, 2 of A, 2 of B (across), 1 of the bias; a scale of 4 bytes each.
        ("int8", {}, 193 + 7 * 4),
        # ceil(0.1 * 193) = 20 values, and as many indices of 4 bytes.
        ("top-k", {"share": 0.1}, 20 * 8),
        ("top-k", {"share": 1.0}, 193 * 8),
    ],
)
def test_the_bytes_of_a_message_are_as_counted_by_hand(name, options, expected):
    method = UPDATES.with_options(name, options)
    assert method.size(SHAPES) == expected
    seen_by(method, tensors())  # raises where the declared size is not that of the arrays


@pytest.mark.parametrize("name", CODECS)
def test_clients_see_the_same_alone_and_together(name):
    given = tensors()
    together = seen_by(CODECS[name], given)
    for i in range(3):
        own = {n: x[i : i + 1] for n, x in given.items()}
        alone = CODECS[name].seen(own, [np.random.default_rng([0, i])], 0, [i])
        for n in SHAPES:
            np.testing.assert_array_equal(alone[n][0], together[n][i])


def test_float32_returns_the_arrays_themselves():
    given = tensors()
    assert CODECS["float32"].seen(given, [], 0, []) is given


def test_float16_rounds_to_the_nearest_and_saturates():
    given = {"w": np.float32([[1.0, 1.0 + 2**-12, 1e6, -1e6]])}
    # 11 bits of significand: 1 + 2**-12 is a quarter of a step above 1.
    assert seen_by(CODECS["float16"], given)["w"].tolist() == [[1.0, 1.0, 65504.0, -65504.0]]


def test_bfloat16_rounds_to_the_nearest_ties_to_even():
    step = 2.0**-7  # of 8 bits of significand, at 1
    values = [1.0, 1 + 0.49 * step, 1 + 0.51 * step, 1 + 0.5 * step, 1 + 1.5 * step, -3.0]
    expected = [1.0, 1.0, 1 + step, 1.0, 1 + 2 * step, -3.0]
    assert seen_by(CODECS["bfloat16"], {"w": np.float32([values])})["w"].tolist() == [expected]
    x = tensors()["B of q"]
    top = [struct.pack(">f", v)[:2] + b"\0\0" for v in np.ravel(x)]
    cut = np.array([struct.unpack(">f", v)[0] for v in top]).reshape(x.shape)
    found = seen_by(CODECS["bfloat16"], {"w": x})["w"]
    # Truncation is at most one step of 2**-7 relative below in magnitude.
    assert (np.abs(found) >= np.abs(cut)).all()
    assert (np.abs(found - x) <= np.abs(x) * 2**-8).all()


def test_int8_is_within_a_step_exact_at_the_largest_and_keeps_zeros():
    row = [127.0, -63.5, 0.25, 0.0]
    found = seen_by(CODECS["int8"], {"w": np.float32([row]), "z": np.zeros((1, 2, 5), np.float32)})
    # The scale is 1: 127 and 0 are integers, -63.5 becomes -64 or -63, 0.25 becomes 0 or 1.
    assert found["w"][0, 0] == 127.0 and found["w"][0, 3] == 0.0
    assert found["w"][0, 1] in (-64.0, -63.0) and found["w"][0, 2] in (0.0, 1.0)
    assert not found["z"].any()


def test_int8_is_unbiased():
    x = np.float32([[127.0, -63.5, 0.25, 99.9]])
    draws = 20_000
    given = {"w": np.repeat(x, draws, axis=0)}
    mean = seen_by(CODECS["int8"], given)["w"].mean(axis=0, dtype=np.float64)
    # A value f above an integer has variance f (1 - f), at most 1/4; five standard errors.
    assert np.abs(mean - x[0]).max() < 5 * 0.5 / math.sqrt(draws)
    assert abs(mean[2] - 0.25) < 5 * math.sqrt(0.25 * 0.75 / draws)


def test_int8_has_a_scale_for_each_column_of_a_tall_factor():
    b = np.float32([[100.0, 0.001], [-50.0, 0.0005], [25.0, -0.001]])
    found = seen_by(CODECS["int8"], {"B of q": b[None]})["B of q"][0]
    # Within a step of each column's own scale, 100 / 127 and 0.001 / 127.
    assert (np.abs(found - b) <= np.abs(b).max(axis=0) / 127 * 1.001).all()


def test_top_k_keeps_the_largest_of_the_whole_update():
    given = {"u": np.float32([[[1.0, -5.0], [0.5, 2.0]]]), "v": np.float32([[4.0, 0.1]])}
    found = seen_by(UPDATES.with_options("top-k", {"share": 0.5}), given)
    # 6 values, 3 are kept: -5, 4 and 2.
    assert found["u"].tolist() == [[[0.0, -5.0], [0.0, 2.0]]]
    assert found["v"].tolist() == [[4.0, 0.0]]


def test_attacks_change_the_update_by_their_factor():
    given = tensors(1)
    flipped = seen_by(UPDATES.with_options("sign-flip", {"factor": 2.0}), given)
    scaled = seen_by(ATTACKS["scaling"], given)
    for name, x in given.items():
        np.testing.assert_array_equal(flipped[name], -2 * x)
        np.testing.assert_array_equal(scaled[name], 10 * x)
    loud = seen_by(UPDATES.with_options("noise", {"std": 3.0}), {"w": np.zeros((1, 10_000), "f4")})
    # The standard error of a standard deviation is 3 / sqrt(2 * 10,000).
    assert loud["w"].std() == pytest.approx(3.0, abs=5 * 3 / math.sqrt(20_000))


def test_label_flip_mirrors_the_classes():
    assert ATTACKS["label-flip"].labels(np.array([0, 1, 4]), 5).tolist() == [4, 3, 0]


def test_clipping_scales_long_updates_to_the_limit_and_keeps_the_bits_of_short_ones():
    # Norms 5 = (3, 4) over two tensors, and 0.5.
    given = {"u": np.float32([[3.0], [0.3]]), "v": np.float32([[[4.0]], [[0.4]]])}
    found = clipped(given, 1.0)
    np.testing.assert_allclose(found["u"][0], [0.6], rtol=1e-6)
    np.testing.assert_allclose(found["v"][0], [[0.8]], rtol=1e-6)
    assert found["u"][1].tolist() == given["u"][1].tolist()
    assert found["v"][1].tolist() == given["v"][1].tolist()


def test_malicious_clients_are_a_share_drawn_from_the_seed():
    first, again = malicious_clients(3, 0.25, 10), malicious_clients(3, 0.25, 10)
    assert len(set(first.tolist())) == 3  # floor(2.5 + 0.5)
    assert first.tolist() == again.tolist() == sorted(first.tolist())
    assert {tuple(malicious_clients(seed, 0.25, 10)) for seed in range(20)} != {tuple(first)}
    assert len(malicious_clients(0, 0.0, 10)) == 0


# --- through `uploaded` -------------------------------------------------------------------------


def state(a: float, b: float, head: float) -> AdapterState:
    q = Factors(np.full((2, 4), a, np.float32), np.full((3, 2), b, np.float32), 1.5)
    return AdapterState({"q": q}, {"head": np.full(5, head, np.float32)})


def stacked(states: list[AdapterState], like: AdapterState) -> StackedStates:
    rows = [np.concatenate([s.dense["head"], *map(np.ravel, _ab(s))]) for s in states]
    shapes = {"head": (5,), A + "q": (2, 4), B + "q": (3, 2)}
    return StackedStates(np.stack(rows), [like] * len(states), shapes)


def _ab(s: AdapterState) -> tuple[np.ndarray, np.ndarray]:
    return s.factors["q"].a, s.factors["q"].b


def _all(s: AdapterState) -> tuple[np.ndarray, ...]:
    return (*_ab(s), s.dense["head"])


def send_all(name: str) -> bool:
    return True


def test_the_server_adds_what_it_sees_of_the_change_to_its_own_state():
    received, exact = state(1.0, 2.0, 3.0), state(1.25, 2.25, 3.25)
    trained = [state(1.5, 2.0, 4.0), state(1.0, 1.0, 3.0)]
    found = uploaded(Upload(0), 0, [4, 7], trained, [received] * 2, [exact] * 2, send_all)
    # Own state plus the change: A 1.25 + 0.5, B 2.25 + 0, head 3.25 + 1; and 1.25, 2.25 - 1, 3.25.
    values = [(s.factors["q"].a[0, 0], s.factors["q"].b[0, 0], s.dense["head"][0]) for s in found]
    assert values == [(1.75, 2.25, 4.25), (1.25, 1.25, 3.25)]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8"])
def test_a_downloaded_state_has_whole_arrays_near_those_of_the_server(name):
    rng = np.random.default_rng(2)
    b, a = rng.standard_normal((3, 2)), rng.standard_normal((2, 4))
    given = AdapterState({"q": Factors(a.astype("f4"), b.astype("f4"), 1.5)}, {})
    found = downloaded(given, Named(name), 0, 0)
    assert found is not None and found.version != given.version
    for own, seen in zip(_ab(given), _ab(found), strict=True):
        assert seen.flags.c_contiguous and (seen != own).any()
        np.testing.assert_allclose(seen, own, atol=np.abs(own).max() / 127)
    assert downloaded(given, Named("float32"), 0, 0) is None


def test_only_malicious_clients_attack_and_only_what_is_sent():
    start = state(1.0, 2.0, 3.0)
    trained = [state(1.5, 2.5, 4.0), state(1.5, 2.5, 4.0)]
    upload = Upload(0, attack=Named("sign-flip"), malicious=frozenset({7}))
    found = uploaded(
        upload, 0, [4, 7], trained, [start] * 2, [start] * 2, lambda n: not n.startswith(B)
    )
    values = [(s.factors["q"].a[0, 0], s.factors["q"].b[0, 0], s.dense["head"][0]) for s in found]
    assert values == [(1.5, 2.5, 4.0), (0.5, 2.5, 2.0)]


@pytest.mark.parametrize("name", ["float16", "int8", "top-k", "float32"])
def test_a_block_gives_the_bits_of_its_clients_alone(name):
    start = state(0.0, 0.0, 0.0)
    rng = np.random.default_rng(1)
    trained = [state(*rng.standard_normal(3)) for _ in range(3)]
    upload = Upload(
        9, Named("noise"), frozenset({5}), clip=0.5, codec=Named(name, {}), uniform=True
    )
    ids, starts = [2, 5, 6], [start] * 3
    alone = uploaded(upload, 3, ids, trained, starts, starts, send_all)
    together = uploaded(upload, 3, ids, stacked(trained, start), starts, starts, send_all)
    assert isinstance(together, StackedStates)
    for one, other in zip(alone, together, strict=True):
        for x, y in zip(_all(one), _all(other), strict=True):
            np.testing.assert_array_equal(x, y)
    norms = [math.sqrt(sum(float((x.astype(float) ** 2).sum()) for x in _all(s))) for s in together]
    # Clipped before the codec and after it.
    assert max(norms) <= 0.5 * (1 + 1e-6)


# --- own methods --------------------------------------------------------------------------------


@pytest.fixture
def own():
    names = []

    def register(decorator, function):
        made = decorator(function)
        names.append(function.__name__)
        return UPDATES[function.__name__], made

    yield register
    for name in names:
        UPDATES.remove(name)


def test_a_codec_that_sends_more_than_it_declares_is_named_with_client_and_round(own):
    def greedy(tensors, rng):
        return tensors, 400

    method, _ = own(update(size=lambda shapes: 300), greedy)
    with pytest.raises(RunError, match=r"'greedy', round 3, client 8: .* 300 bytes, got 400"):
        method.seen({"w": np.zeros((1, 5), np.float32)}, rngs(1), 2, [8])


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ({"w": np.zeros(4, np.float32)}, r"expected float32 of shape \(1, 5\), got float32 of"),
        ({"w": np.zeros(5)}, "got float64"),
        ({"v": np.zeros(5, np.float32)}, r"expected a mapping with the tensors \['w'\]"),
        ({"w": np.full(5, np.nan, np.float32)}, "expected finite values"),
    ],
)
def test_what_an_own_method_returns_is_checked(own, returned, expected):
    def odd(tensors, rng):
        return returned

    method, _ = own(update(), odd)
    with pytest.raises(RunError, match=rf"update 'odd', round 1, client 0.*{expected}"):
        method.seen({"w": np.zeros((1, 5), np.float32)}, rngs(1), 0, [0])


def test_an_own_method_has_typed_options_which_its_size_gets_too(own):
    def first(tensors, rng, *, values: int = 2):
        return {n: np.where(np.arange(x.size) < values, x, 0) for n, x in tensors.items()}, (
            4 * values * len(tensors)
        )

    _, made = own(update(size=lambda shapes, *, values=2: 4 * values * len(shapes)), first)
    method = UPDATES.with_options("first", {"values": 3})
    found = seen_by(method, {"w": np.ones((2, 5), np.float32)})
    assert found["w"].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert method.size({"w": (5,), "v": (9,)}) == 24
    assert made(values=3).options == {"values": 3}
