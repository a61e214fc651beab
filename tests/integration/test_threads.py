"""Training in several threads of one process gives what training in one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rayfed_lora

# Of the shipped recipe.
SMALLER: dict[str, Any] = {
    "data.partition.clients": 12,
    "model.config.hidden_size": 16,
    "model.config.intermediate_size": 24,
    "annealing.initiating.rounds": 1,
    "annealing.heating.rounds": 1,
    "annealing.heating.rank": 4,
    "annealing.cooling.rounds": 1,
    "annealing.cooling.rank": 2,
    "annealing.holding.rounds": 0,
    "clients.per_round": 8,
    "clients.local_steps": 2,
    "clients.batch_size": 8,
    "evaluation.client_fraction": 0.2,
    "evaluation.clients_every": 2,
    "runtime.executor": "local",
    "runtime.device": "cpu",
    "runtime.cohort_size": 2,
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_thread_and_two_give_the_same_bits(tmp_path: Path, dropout: float) -> None:
    found = []
    for threads in (1, 2):
        changes = {
            **SMALLER,
            "runtime.client_actors": threads,
            "model.config.hidden_dropout_prob": dropout,
        }
        recipe = rayfed_lora.load_recipe("digits-vit", changes)
        found.append(rayfed_lora.run(recipe, out=str(tmp_path / str(threads))))
    one, two = found
    assert one.summary["adapter_sha256"] == two.summary["adapter_sha256"]
    for name in ("train_loss", "eval_loss", "eval_accuracy", "aggregation_error", "bytes_up"):
        np.testing.assert_array_equal(one.rounds[name], two.rounds[name], err_msg=name)
    for name in ("client", "train_loss"):
        np.testing.assert_array_equal(one.clients[name], two.clients[name], err_msg=name)
