"""Examples: a table that is shared, arrays that are views of it."""

from __future__ import annotations

import pickle

import numpy as np

from rayfed_lora.data.examples import Examples

# Texts of 2, 3 and 1 tokens.
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], np.int32)
TOKENS = np.array([[5, 6, 0, 0], [7, 8, 9, 0], [4, 0, 0, 0]], np.int32)
TEXTS = Examples.of({"input_ids": TOKENS, "attention_mask": MASK}, np.array([1, 0, 2]))


def test_rows_are_cut_to_the_longest_text_among_them() -> None:
    batch = TEXTS.rows(np.array([2, 0]))
    np.testing.assert_array_equal(batch.inputs["input_ids"], [[4, 0], [5, 6]])
    np.testing.assert_array_equal(batch.inputs["attention_mask"], [[1, 0], [1, 1]])
    np.testing.assert_array_equal(batch.labels, [2, 1])


def test_arrays_are_read_only_views_of_the_table() -> None:
    address = TEXTS.table["input_ids"].chunk(0).storage.values.buffers()[1].address
    assert TEXTS.inputs["input_ids"].ctypes.data == address
    assert not TEXTS.inputs["input_ids"].flags.writeable
    assert not TEXTS.labels.flags.writeable


def test_a_table_without_rows_keeps_its_shapes() -> None:
    none = Examples.of({"pixel_values": np.zeros((0, 3, 8, 8), np.float32)}, np.zeros(0))
    assert len(none) == 0
    assert none.inputs["pixel_values"].shape == (0, 3, 8, 8)
    assert none.labels.dtype == np.int64


def test_views_do_not_travel_with_the_table() -> None:
    rows = np.zeros((500, 1, 8, 8), np.float32)
    looked_at = Examples.of({"pixel_values": rows}, np.zeros(500))
    size = len(pickle.dumps(looked_at))
    assert looked_at.inputs["pixel_values"].nbytes == rows.nbytes
    assert len(pickle.dumps(looked_at)) == size
    again = pickle.loads(pickle.dumps(looked_at))
    np.testing.assert_array_equal(again.inputs["pixel_values"], rows)
