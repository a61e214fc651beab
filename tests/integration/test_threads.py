"""Training in several threads of one process gives what training in one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rayfed_lora

RECIPE: dict[str, Any] = {
    "name": "threads",
    "method": "sa-fedlora",
    "data": {"source": "digits", "partition": {"clients": 12}},
    "model": {
        "task": "image-classification",
        "source": "config",
        "config": {
            "architecture": "vit",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
        },
    },
    "annealing": {
        "initiating": {"rounds": 1},
        "heating": {"rounds": 2, "rank": 4},
        "cooling": {"rounds": 2, "rank": 2},
        "holding": {"rounds": 0},
    },
    "clients": {"per_round": 8, "local_steps": 2, "batch_size": 8},
    "evaluation": {"client_fraction": 0.2, "clients_every": 2},
    "runtime": {"executor": "local", "device": "cpu", "cohort_size": 2},
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_thread_and_three_give_the_same_bits(tmp_path: Path, dropout: float) -> None:
    found = []
    for threads in (1, 3):
        changes = {
            "runtime.client_actors": threads,
            "model.config": {**RECIPE["model"]["config"], "hidden_dropout_prob": dropout},
        }
        recipe = rayfed_lora.load_recipe(RECIPE, changes)
        found.append(rayfed_lora.run(recipe, out=str(tmp_path / str(threads))))
    one, three = found
    assert one.summary["adapter_sha256"] == three.summary["adapter_sha256"]
    for name in ("train_loss", "eval_loss", "eval_accuracy", "aggregation_error", "bytes_up"):
        np.testing.assert_array_equal(one.rounds[name], three.rounds[name], err_msg=name)
    np.testing.assert_array_equal(one.clients["client"], three.clients["client"])
