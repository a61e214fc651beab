"""Client-level differential privacy: the server's noise, and epsilon so far.

Each client's update is clipped to 2-norm C, and the server, which is trusted, adds normal noise of
standard deviation z C to the sum before it divides by the expected number of clients. What a run
reports beside its model (losses, aggregation errors, numbers of clients) is not protected.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models",
arXiv:1710.06963, Algorithm 1 with flat clipping and the fixed-denominator estimator; accountant:
Renyi divergences by the package dp-accounting.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from rayfed_lora.aggregation.means import Means
from rayfed_lora.errors import BadInputError
from rayfed_lora.lora.stacked import named
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.wire import Privacy
from rayfed_lora.types import AdapterState, Frozen
from rayfed_lora.wire.upload import is_sent, rng_of


def check_privacy(recipe: Recipe) -> None:
    """Raise a BadInputError where epsilon is wanted and cannot be computed here."""
    if recipe.privacy is not None and find_spec("dp_accounting") is None:
        raise BadInputError(
            "privacy: expected the Python package dp-accounting to be installed, it is not;"
            " pip install 'rayfed-lora[privacy]'"
        )


class Accountant:
    """Computes epsilon after some rounds of a run."""

    def __init__(self, recipe: Recipe, clients: int) -> None:
        """Take a recipe, with or without privacy, and the number of all clients."""
        self._privacy = recipe.privacy
        self._clients, self._cohort = clients, recipe.cohort_size(clients)

    def epsilon(self, rounds: int) -> float | None:
        """Return epsilon after so many rounds; None without privacy.

        Sampling `poisson`: each client takes part with probability q = cohort / clients; one client
        is added or removed, which changes the sum by C at most: noise multiplier z. `fixed`: the
        cohort is drawn without replacement; one client is replaced by another, which changes the
        sum by 2 C at most: noise multiplier z / 2.
        """
        if self._privacy is None:
            return None
        return _epsilon(self._privacy, self._cohort, self._clients, rounds)

    @property
    def statement(self) -> str | None:
        """What epsilon means; None without privacy."""
        if self._privacy is None:
            return None
        neighbour = {
            "fixed": f"fixed cohorts of {self._cohort} without replacement; one client replaced",
            "poisson": f"Poisson sampling of {self._cohort} clients on average; one client added or"
            " removed",
        }[self._privacy.sampling]
        return f"client-level, trusted server, {neighbour}"


@cache
def _epsilon(privacy: Privacy, cohort: int, clients: int, rounds: int) -> float:
    # Late: an optional package.
    import dp_accounting as dp
    from dp_accounting import rdp

    event: Any
    noise = privacy.noise_multiplier
    if privacy.sampling == "poisson":
        relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
        event = dp.PoissonSampledDpEvent(cohort / clients, dp.GaussianDpEvent(noise))
    else:
        relation = dp.NeighboringRelation.REPLACE_ONE
        gaussian = dp.GaussianDpEvent(noise / 2)
        event = dp.SampledWithoutReplacementDpEvent(clients, cohort, gaussian)
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(privacy.delta))


def noised(
    means: Means,
    start: AdapterState,
    recipe: Recipe,
    round_index: int,
    arrived: int,
    expected: int,
    frozen: Frozen | None,
) -> Means:
    """Return means with the noisy sum of updates over a fixed denominator in place of the mean.

    Each sent tensor becomes x + (sum of updates + noise) / expected, in float64.

    Args:
        means: of the clipped updates, all of weight 1; empty where no client took part.
        start: x, which the updates are changes of.
        recipe: gives privacy and seed.
        round_index: from 0.
        arrived: number of clients in `means`.
        expected: number of clients that a round draws on average.
        frozen: the factor that no client trains.
    """
    privacy = recipe.privacy
    if privacy is None:
        return means
    rng = rng_of(recipe.seed, "privacy", round_index, 0)
    found, tensors = means.tensors() if arrived else {}, {}
    for name, x in named(start).items():
        own = x.astype(np.float64)
        if not is_sent(name, frozen, own_b=False):
            tensors[name] = own
            continue
        total = (found[name] - own) * arrived if arrived else np.zeros_like(own)
        noise = rng.normal(0.0, privacy.noise_multiplier * privacy.clip, own.shape)
        tensors[name] = own + (total + noise) / expected
    return means.with_tensors(tensors)
