"""`check-plugin` of models for texts, on texts and a tokenizer of its own."""

from __future__ import annotations

import pytest

from rayfed_lora.launching.check_plugin import check_plugin
from rayfed_lora.plugins import registry

MODULE = """
import torch
from torch import nn
from rayfed_lora.plugins import data, model


class Sums(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.words = nn.Embedding(vocabulary, 8)
        self.inside, self.out = nn.Linear(8, 8), nn.Linear(8, vocabulary)

    def forward(self, ids, mask):
        return self.out(torch.tanh(self.inside((self.words(ids) * mask[..., None]).cumsum(1))))


@model(task="causal-lm")
def sums_of_a_test(vocabulary, length):
    return Sums(vocabulary)


calls = []


@data()
def same_of_a_test(rng):
    return [{"text": str(n), "label": 0} for n in rng.integers(100, size=3)]


@data()
def other_of_a_test():
    calls.append(1)
    return [{"text": "a", "label": len(calls)}]
"""


@pytest.mark.usefixtures("forgotten_methods")
def test_a_language_model_is_equal_in_all_ways_and_data_are_read_twice(tmp_path, monkeypatch):
    (tmp_path / "texts_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = registry.allowed()
    try:
        found = {check.method.short: check for check in check_plugin("texts_of_a_test")}
    finally:
        registry._ALLOWED.intersection_update(before)
    assert found["sums-of-a-test"].passed, found["sums-of-a-test"].outcomes
    assert set(found["sums-of-a-test"].outcomes) == {
        "one trainer again",
        "two trainers",
        "stop and resume",
        "smaller blocks",
    }
    assert found["same-of-a-test"].outcomes == {"read again": "equal"}
    assert "in place of" in found["other-of-a-test"].outcomes["read again"]
