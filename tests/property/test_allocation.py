"""Spectral allocation against slow references that share no code with it."""

from __future__ import annotations

import itertools
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from rayfed_lora.annealing import budget
from rayfed_lora.types import ModuleShape

cheap = settings(max_examples=80, deadline=None)
SIZE = st.integers(1, 6)
# Whole numbers: their energies are exact, so that ties are ties in floats and in fractions.
SPECTRUM = st.lists(st.integers(0, 9).map(float), max_size=6).map(lambda s: sorted(s)[::-1])


@st.composite
def problems(draw, same_size: bool = False):
    count = draw(st.integers(1, 4))
    if same_size:
        shapes = [ModuleShape(draw(SIZE), draw(SIZE))] * count
    else:
        shapes = [ModuleShape(draw(SIZE), draw(SIZE)) for _ in range(count)]
    names = [f"m{i}" for i in range(count)]
    spectra = {n: draw(SPECTRUM)[: s.max_rank] for n, s in zip(names, shapes, strict=True)}
    return dict(zip(names, shapes, strict=True)), spectra, draw(st.integers(0, 7))


def values(shapes, ranks) -> int:
    return sum(ranks[n] * (s.d_in + s.d_out) for n, s in shapes.items())


def uniform_budget(shapes, rank) -> int:
    return sum(min(rank, s.d_in, s.d_out) * (s.d_in + s.d_out) for s in shapes.values())


def energy(spectrum, i) -> Fraction:
    return Fraction(spectrum[i]) ** 2 if i < len(spectrum) else Fraction(0)


def auction(shapes, spectra, rank) -> dict[str, int]:
    """One direction at a time: of each module's next one, the best by energy a value that fits.

    Equals go to the lower direction, then to the earlier module.
    """
    left = uniform_budget(shapes, rank)
    ranks = dict.fromkeys(shapes, 0)
    while True:
        offers = []
        for position, (name, shape) in enumerate(shapes.items()):
            price = shape.d_in + shape.d_out
            if ranks[name] < min(shape.d_in, shape.d_out) and price <= left:
                worth = energy(spectra[name], ranks[name]) / price
                offers.append((-worth, ranks[name], position, name, price))
        if not offers:
            return ranks
        *_, name, price = min(offers)
        ranks[name] += 1
        left -= price


@cheap
@given(problem=problems())
def test_spectral_is_the_auction_of_directions(problem):
    assert budget.spectral(*problem) == auction(*problem)


@cheap
@given(problem=problems(same_size=True))
def test_no_choice_of_ranks_keeps_more_energy_where_modules_have_one_size(problem):
    shapes, spectra, rank = problem
    got = budget.spectral(shapes, spectra, rank)

    def kept(ranks) -> Fraction:
        return sum((energy(spectra[n], i) for n, r in ranks.items() for i in range(r)), Fraction(0))

    choices = itertools.product(*(range(s.max_rank + 1) for s in shapes.values()))
    affordable = (
        ranks
        for choice in choices
        if values(shapes, ranks := dict(zip(shapes, choice, strict=True)))
        <= uniform_budget(shapes, rank)
    )
    assert kept(got) == max(kept(ranks) for ranks in affordable)


@cheap
@given(problem=problems())
def test_spectral_never_spends_more_than_the_uniform_rank_and_leaves_nothing_that_fits(problem):
    shapes, spectra, rank = problem
    got = budget.spectral(shapes, spectra, rank)
    left = uniform_budget(shapes, rank) - values(shapes, got)
    assert left >= 0
    for name, shape in shapes.items():
        assert 0 <= got[name] <= min(shape.d_in, shape.d_out)
        assert got[name] == min(shape.d_in, shape.d_out) or left < shape.d_in + shape.d_out


@cheap
@given(d_in=SIZE, d_out=SIZE, count=st.integers(1, 4), spectrum=SPECTRUM, rank=st.integers(0, 7))
def test_spectral_is_uniform_where_modules_and_spectra_are_equal(
    d_in, d_out, count, spectrum, rank
):
    shapes = {f"m{i}": ModuleShape(d_in, d_out) for i in range(count)}
    got = budget.spectral(shapes, dict.fromkeys(shapes, spectrum), rank)
    assert got == dict.fromkeys(shapes, min(rank, d_in, d_out))


@cheap
@given(problem=problems())
def test_the_cost_is_that_of_arrays_of_these_sizes(problem):
    shapes, _, rank = problem
    got = budget.uniform(shapes, rank)
    assert got == {n: min(rank, s.d_in, s.d_out) for n, s in shapes.items()}
    assert budget.cost(shapes, got) == uniform_budget(shapes, rank)
