"""States are judged by their values: whether code makes a copy changes no result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rayfed_lora.federation.progress import Progress, kept_moments

from rayfed_lora.federation.transitions import Entry, GlobalModel, protected
from rayfed_lora.types import AdapterState, Base, Factors


def state(first: float = 1.0) -> AdapterState:
    a, b = np.full((2, 3), first, np.float32), np.ones((4, 2), np.float32)
    return AdapterState({"q": Factors(a, b, 0.5)}, {"head": np.ones(2, np.float32)})


MOMENTS = {name: (np.ones(2),) for name in ("A of q", "B of q", "head")}


def kept(after: AdapterState) -> set[str]:
    before = Progress(1, GlobalModel(state(), Base(0), "adapter"), moments=MOMENTS)
    return {*kept_moments(before, Entry(GlobalModel(after, Base(0), "adapter"), {"q": 2}))}


def test_moments_survive_a_copy_of_the_factors_and_not_a_change() -> None:
    other_scale = {"q": replace(state().factors["q"], scale=1.0)}
    assert kept(state()) == {"A of q", "B of q", "head"}
    assert kept(state(first=2.0)) == {"head"}
    assert kept(replace(state(), factors=other_scale)) == {"head"}
    assert kept(replace(state(), factors={})) == {"head"}


def test_a_global_state_cannot_be_changed_in_place() -> None:
    found = protected(state())
    for array in (found.factors["q"].a, found.factors["q"].b, found.dense["head"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 2
