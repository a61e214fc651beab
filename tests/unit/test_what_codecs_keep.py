"""Codecs on modules of rank 0, and error feedback where a round sends only some tensors."""

from __future__ import annotations

import numpy as np

from rayfed_lora.wire.built_in.int8 import int8
from rayfed_lora.wire.upload import Lost


def test_int8_of_a_module_of_rank_0_sends_nothing() -> None:
    empty = {"A": np.zeros((2, 0, 5), np.float32), "B": np.zeros((2, 4, 0), np.float32)}
    seen, sent = int8(empty, [np.random.default_rng(k) for k in range(2)])
    assert sent == 0
    assert {name: x.shape for name, x in seen.items()} == {"A": (2, 0, 5), "B": (2, 4, 0)}


def test_what_was_lost_of_a_tensor_waits_for_the_round_that_sends_it_again() -> None:
    a, b = np.ones((1, 2), np.float32), np.full((1, 3), 2, np.float32)
    first = Lost({})
    first.note({"A": a}, {"A": a / 2}, [7])
    second = Lost(first.after)
    second.note({"B": b}, {"B": b / 2}, [7])
    third = Lost(second.after).added({"A": a}, [7])
    np.testing.assert_array_equal(third["A"], [[1.5, 1.5]])
    np.testing.assert_array_equal(second.after[7]["B"], [1, 1, 1])
