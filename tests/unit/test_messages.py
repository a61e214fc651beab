"""What server and actors send each other."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from rayfed_lora.engines.on_ray.messages import packed, unpacked

from rayfed_lora.types import AdapterState, Factors

rng = np.random.default_rng(0)


def state(width: int) -> AdapterState:
    a = rng.normal(size=(2, width)).astype(np.float32)
    b = rng.normal(size=(width, 2)).astype(np.float32)
    return AdapterState({"q": Factors(a, b, 2.0)}, {"head": a + 1})


def assert_same(found: AdapterState, sent: AdapterState) -> None:
    assert found.factors["q"].scale == 2.0
    np.testing.assert_array_equal(found.factors["q"].a, sent.factors["q"].a)
    np.testing.assert_array_equal(found.factors["q"].b, sent.factors["q"].b)
    np.testing.assert_array_equal(found.dense["head"], sent.dense["head"])


def test_small_values_are_bytes_that_ray_passes_on_as_they_are():
    sent = state(8)
    message = packed(sent)
    assert isinstance(message, bytes)
    assert_same(unpacked(message), sent)


def test_large_arrays_stay_beside_the_message_and_are_not_copied():
    sent = state(1 << 15)
    message = packed(sent)
    assert isinstance(message, tuple)
    data, *apart = message
    # A, B and the head, 256 kB each.
    assert len(data) < 1_000
    assert [buffer.raw().nbytes for buffer in apart] == [1 << 18] * 3
    found = unpacked(message)
    assert_same(found, sent)
    assert np.shares_memory(found.factors["q"].a, sent.factors["q"].a)


def test_it_is_for_what_needs_no_cloudpickle():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        packed(lambda: None)
