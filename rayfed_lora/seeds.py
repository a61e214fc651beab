"""Random streams keyed by their purpose, independent of the order of draws and of the process.

Source: this project (docs/method.md, "Randomness"), on numpy's SeedSequence.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Purposes of random streams; renumbering them would change every result."""

    SPLIT = 0
    PARTITION = 1
    MODEL_INIT = 2
    FACTOR_INIT = 3
    COHORT = 4
    BATCHES = 5
    DROPOUT = 6
    ACCEPTANCE = 7
    RANKS = 8
    CLIENT_SPLIT = 9
    TESTED_CLIENTS = 10
    DEVICES = 11
    DEPARTURES = 12
    UPDATE = 13
    GENERATION = 14
    DATA = 15


def sequence(seed: int, purpose: Purpose, *key: int) -> np.random.SeedSequence:
    """Return the seed sequence of one stream of a run.

    The seed is >= 0; `key` are further counters >= 0, e.g. round and client.
    """
    return np.random.SeedSequence(entropy=seed, spawn_key=(int(purpose), *key))


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """Return a numpy generator for one stream; arguments as for `sequence`.

    >>> draws = [generator(0, Purpose.COHORT, 3).integers(1000) for _ in range(2)]
    >>> bool(draws[0] == draws[1])
    True
    """
    return np.random.Generator(np.random.PCG64(sequence(seed, purpose, *key)))


def torch_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """Return a 63-bit seed for `torch.manual_seed`; arguments as for `sequence`."""
    return int(sequence(seed, purpose, *key).generate_state(1, np.uint64)[0] >> np.uint64(1))
