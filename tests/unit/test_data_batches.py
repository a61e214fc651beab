from __future__ import annotations

import numpy as np
import pytest

from rayfed_lora.data.client_table import batch_indices

EXAMPLES = np.array([10, 20, 30, 40, 50])


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_an_epoch_visits_every_example_once_and_its_last_batch_is_smaller():
    batches = batch_indices(EXAMPLES, 2, rng(), epochs=1)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert sorted(np.concatenate(batches)) == [10, 20, 30, 40, 50]


def test_every_epoch_is_a_permutation_of_its_own():
    batches = batch_indices(np.arange(50), 50, rng(), epochs=3)
    assert [sorted(batch) for batch in batches] == [list(range(50))] * 3
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[1], batches[2])


def test_steps_are_full_batches_cut_from_one_stream_of_permutations():
    batches = batch_indices(EXAMPLES, 2, rng(), steps=5)
    assert [len(batch) for batch in batches] == [2] * 5
    # 5 steps of 2 are 10 examples: two whole passes over 5
    stream = np.concatenate(batches)
    assert sorted(stream[:5]) == sorted(stream[5:]) == [10, 20, 30, 40, 50]


def test_a_client_smaller_than_the_batch_uses_all_of_its_examples_in_each_step():
    batches = batch_indices(EXAMPLES, 16, rng(), steps=3)
    assert [sorted(batch) for batch in batches] == [[10, 20, 30, 40, 50]] * 3


def test_a_client_with_one_example_repeats_it():
    assert [list(b) for b in batch_indices(np.array([9]), 4, rng(), steps=2)] == [[9], [9]]


def test_fewer_steps_than_a_pass_take_distinct_examples():
    batches = batch_indices(np.arange(100), 10, rng(), steps=3)
    assert len(np.unique(np.concatenate(batches))) == 30


def test_the_same_stream_gives_the_same_batches_and_the_input_is_left_alone():
    before = EXAMPLES.copy()
    first = batch_indices(EXAMPLES, 2, rng(), steps=4)
    second = batch_indices(EXAMPLES, 2, rng(), steps=4)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(EXAMPLES, before)


@pytest.mark.parametrize(
    ("examples", "batch_size", "lengths", "message"),
    [
        (np.array([], dtype=np.int64), 2, {"steps": 1}, "empty client"),
        (EXAMPLES, 0, {"steps": 1}, "batch_size > 0, got 0"),
        (EXAMPLES, 2, {}, "one of steps and epochs"),
        (EXAMPLES, 2, {"steps": 1, "epochs": 1}, "one of steps and epochs"),
        (EXAMPLES, 2, {"steps": 0}, "steps > 0, got 0"),
        (EXAMPLES, 2, {"epochs": 0}, "epochs > 0, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(examples, batch_size, lengths, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(examples, batch_size, rng(), **lengths)
