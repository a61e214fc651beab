"""Random streams: equal for equal keys, apart for any other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rayfed_lora import seeds
from rayfed_lora.seeds import Purpose


def test_the_numbers_of_the_purposes_are_part_of_every_result():
    pinned = {
        "SPLIT": 0,
        "PARTITION": 1,
        "MODEL_INIT": 2,
        "FACTOR_INIT": 3,
        "COHORT": 4,
        "BATCHES": 5,
        "DROPOUT": 6,
        "ACCEPTANCE": 7,
    }
    got = {purpose.name: int(purpose) for purpose in Purpose}
    assert {name: got.get(name) for name in pinned} == pinned
    assert len(set(got.values())) == len(got)


def test_equal_keys_give_equal_streams_whatever_was_drawn_before():
    first = seeds.generator(3, Purpose.BATCHES, 5, 7).random(8)
    seeds.generator(3, Purpose.BATCHES, 5, 8).random(100)
    again = seeds.generator(3, Purpose.BATCHES, 5, 7).random(8)
    np.testing.assert_array_equal(first, again)


def test_streams_differ_by_seed_purpose_and_every_part_of_the_key():
    keys = [
        (seed, purpose, *key)
        for seed, purpose in itertools.product((0, 1), Purpose)
        for key in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    ]
    firsts = {tuple(seeds.generator(*key).integers(2**63, size=2)) for key in keys}
    assert len(firsts) == len(keys)


def test_a_stream_is_numpys_own_for_the_run_seed_and_the_purpose_as_spawn_key():
    # COHORT is 4
    entropy = np.random.SeedSequence(entropy=11, spawn_key=(4, 2))
    expected = np.random.Generator(np.random.PCG64(entropy)).random(4)
    np.testing.assert_array_equal(seeds.generator(11, Purpose.COHORT, 2).random(4), expected)


def test_a_torch_seed_is_the_first_word_of_the_sequence_without_its_lowest_bit():
    word = np.random.SeedSequence(entropy=11, spawn_key=(6, 1, 2)).generate_state(1, np.uint64)
    assert seeds.torch_seed(11, Purpose.DROPOUT, 1, 2) == int(word[0]) // 2


def test_torch_seeds_fit_into_a_signed_word_and_differ_by_key():
    got = [seeds.torch_seed(0, Purpose.DROPOUT, r, c) for r in range(20) for c in range(20)]
    assert all(0 <= seed < 2**63 for seed in got)
    assert len(set(got)) == 400


def test_a_negative_key_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        seeds.generator(0, Purpose.COHORT, -1)
