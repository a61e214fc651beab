"""Metrics against scikit-learn and against values done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from rayfed_lora.federation.evaluation import mean_f1, one_vs_rest_auc, scores, shards
from rayfed_lora.types import Predictions


def said(labels: list[int], probabilities: np.ndarray, tokens: int = 1) -> Predictions:
    """What a model that gives these probabilities says."""
    true = np.array(labels)
    classes = probabilities.argmax(axis=1)
    losses = -np.log(probabilities[np.arange(len(true)), true]).astype(np.float32)
    ones = np.full(len(true), tokens)
    return Predictions(
        true, losses, (classes == true).astype(np.int64), ones, classes, probabilities
    )


@settings(max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
def test_macro_f1_is_that_of_scikit_learn(labels, seed):
    predicted = np.random.default_rng(seed).integers(0, 6, len(labels))
    expected = f1_score(labels, predicted, average="macro")
    assert mean_f1(np.array(labels), predicted) == pytest.approx(expected)


@settings(max_examples=60)
@given(classes=st.integers(2, 5), rows=st.integers(1, 30), digits=st.integers(1, 3))
def test_auc_is_that_of_scikit_learn_ties_included(classes, rows, digits):
    draw = np.random.default_rng(rows)
    labels = np.concatenate([np.arange(classes), draw.integers(0, classes, rows)])
    # rounded, so that there are ties; the rows sum to one, as scikit-learn asks
    weights = np.round(draw.random((len(labels), classes)), digits) + 0.5
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    each = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(classes)]
    expected = np.mean(each)
    if classes > 2:
        assert roc_auc_score(labels, probabilities, multi_class="ovr") == pytest.approx(expected)
    assert one_vs_rest_auc(labels, probabilities) == pytest.approx(expected)


def test_a_class_that_does_not_occur_is_left_out_of_the_auc():
    labels = np.array([0, 1, 1])
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    assert one_vs_rest_auc(labels, probabilities) == 1.0


def test_an_auc_needs_two_classes_and_numbers():
    assert one_vs_rest_auc(np.array([1, 1]), np.full((2, 2), 0.5)) is None
    assert one_vs_rest_auc(np.array([0, 1]), np.array([[np.nan, 1.0], [0.0, 1.0]])) is None


def test_scores_over_shards_are_those_over_all_rows():
    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.ones(3), size=11).astype(np.float32)
    labels = draw.integers(0, 3, 11).tolist()
    whole = scores([said(labels, probabilities)])
    parts = [said(labels[rows], probabilities[rows]) for rows in shards(11, 4)]
    assert len(parts) == 3
    assert scores(parts) == whole
    right = probabilities.argmax(axis=1) == labels
    assert whole["accuracy"] == right.mean()
    assert whole["loss"] == pytest.approx(
        -np.log(probabilities[np.arange(11), labels]).mean(), rel=1e-6
    )
    assert whole["perplexity"] is None


def test_without_probabilities_there_is_no_auc_but_all_else():
    part = said([0, 1], np.array([[0.9, 0.1], [0.8, 0.2]], np.float32))
    bare = Predictions(part.labels, part.losses, part.correct, part.predicted, part.classes)
    found = scores([bare])
    assert (found["accuracy"], found["auc"]) == (0.5, None)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_of_a_language_model_perplexity_is_over_tokens():
    losses, counts = np.array([3.0, 1.0], np.float32), np.array([4, 1])
    none = np.array([-1, -1])
    found = scores([Predictions(none, losses, np.array([2, 1]), counts, none)])
    assert (found["accuracy"], found["loss"]) == (0.6, 0.8)
    assert found["perplexity"] == pytest.approx(np.exp(0.8))
    assert (found["macro_f1"], found["auc"]) == (None, None)


def test_a_perplexity_beyond_all_numbers_is_infinite():
    none = np.array([-1])
    part = Predictions(none, np.array([1e30], np.float32), none + 1, none + 2, none)
    assert scores([part])["perplexity"] == np.inf
