"""The same recipe gives the same adapter, bit for bit, wherever and as often as it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

RECIPE = """\
name: repeated
data: {source: digits, max_examples: 200, partition: {clients: 8}}
model:
  config: {architecture: vit, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
    intermediate_size: 48, patch_size: 2, hidden_dropout_prob: 0.1}
adapter: {dropout: 0.1}
annealing:
  initiating: {rounds: 2}
  heating: {rounds: 2, rank: 8}
  cooling: {rounds: 3, rank: 2, shape: cosine}
  holding: {rounds: 1}
clients: {per_round: 5, local_steps: 6, batch_size: 8, optimizer: {name: adamw, lr: 0.01}}
evaluation: {batch_size: 100}
runtime: {device: cpu}
"""
PROGRAM = "from rayfed_lora.cli.commands import main; main()"
# Every rule, and every feedback that looks at the trained weights.
VARIANTS = {
    "factor-average": ["annealing.allocation=spectral"],
    "product-svd": [
        "aggregation.rule=product-svd",
        "annealing.acceptance=metropolis",
        "adapter.scaling=rslora",
    ],
}
PLACES = {
    "again": ["runtime.executor=local"],
    "one actor": ["runtime.executor=ray", "runtime.client_actors=1"],
    "two actors": ["runtime.executor=ray", "runtime.client_actors=2", "runtime.cpus_per_actor=0.5"],
}


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    summary: dict[str, Any]
    rounds: pd.DataFrame
    clients: pd.DataFrame
    adapter: bytes


Execute = Callable[[str, list[str]], Run]


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Execute:
    """Run a variant in a process of its own."""
    recipe = tmp_path_factory.mktemp("recipe") / "repeated.yaml"
    recipe.write_text(RECIPE)

    def run(variant: str, place: list[str]) -> Run:
        out = tmp_path_factory.mktemp("runs") / "run"
        sets = [part for text in (*VARIANTS[variant], *place) for part in ("--set", text)]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "run", str(recipe), "--out", str(out), *sets],
            capture_output=True,
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )
        assert (done.returncode, done.stderr) == (0, "")
        return Run(
            json.loads((out / "summary.json").read_text()),
            pd.read_parquet(out / "rounds.parquet").drop(columns="seconds"),
            pd.read_parquet(out / "clients.parquet").drop(columns="seconds"),
            (out / "adapter/adapter_model.safetensors").read_bytes(),
        )

    return run


@pytest.fixture(scope="module", params=VARIANTS)
def first(request: pytest.FixtureRequest, execute: Execute) -> tuple[str, Run]:
    """A variant, and its first run."""
    return request.param, execute(request.param, ["runtime.executor=local"])


PLACE_NAMES = [
    pytest.param(name, marks=pytest.mark.ray if "actor" in name else ()) for name in PLACES
]


@pytest.mark.parametrize("place", PLACE_NAMES)
def test_a_run_gives_the_same_bits_everywhere(
    place: str, first: tuple[str, Run], execute: Execute
) -> None:
    variant, expected = first
    found = execute(variant, PLACES[place])
    for key in ("adapter_sha256", "final", "best", "communication", "labels"):
        assert found.summary[key] == expected.summary[key]
    assert found.adapter == expected.adapter
    pd.testing.assert_frame_equal(found.rounds, expected.rounds, check_exact=True)
    pd.testing.assert_frame_equal(found.clients, expected.clients, check_exact=True)


def test_another_seed_gives_another_adapter(first: tuple[str, Run], execute: Execute) -> None:
    variant, expected = first
    found = execute(variant, ["runtime.executor=local", "seed=1"])
    assert found.summary["adapter_sha256"] != expected.summary["adapter_sha256"]


def test_all_stages_and_every_kind_of_rank_are_in_what_is_compared(
    first: tuple[str, Run],
) -> None:
    _, run = first
    assert list(dict.fromkeys(run.rounds["stage"])) == [
        "initiating",
        "heating",
        "cooling",
        "holding",
    ]
    assert run.rounds["rank"].isna().sum() == 2
    assert run.rounds["rank"].nunique() >= 2
