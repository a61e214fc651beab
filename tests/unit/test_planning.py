"""The plan's schedule and bill against those of runs that really happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from rayfed_lora.aggregation.messages import trained_factors
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.launching import launch, planning
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.presets import PRESETS
from rayfed_lora.recipe.recipe import Recipe

# 1437 training digits cut to 90, dealt to 6 clients, 3 of them a round.
RECIPE: dict[str, Any] = {
    "name": "planned",
    "data": {"source": "digits", "max_examples": 90, "partition": {"clients": 6}},
    "model": {
        "config": {
            "architecture": "vit",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "patch_size": 4,
        }
    },
    "annealing": {
        "initiating": {"rounds": 1, "lr": 0.02},
        "heating": {"rounds": 2, "rank": 4},
        "cooling": {"rounds": 2, "rank": 1, "shape": "linear"},
        "holding": {"rounds": 1},
    },
    "clients": {
        "per_round": 3,
        "local_steps": 1,
        "batch_size": 4,
        "lr_schedule": {"shape": "linear", "warmup_rounds": 1},
    },
    "evaluation": {"every": 6},
    "runtime": {"executor": "local", "device": "cpu"},
}
METHODS: dict[str, dict[str, Any]] = {
    "sa-fedlora": {},
    "sa-fedlora ramp": {"annealing.heating.shape": "ramp"},
    "sa-fedlora adapter": {"annealing.initiating.trainable": "adapter"},
    "sa-fedlora fold": {"annealing.cooling.residual": "fold"},
    **{method: {"method": method} for method in PRESETS if method not in ("sa-fedlora", "spd-cfl")},
    **{
        f"sa-fedlora {rule}": {"aggregation.rule": rule}
        # The other rules send what factor-average does, or go with one rank only.
        for rule, entry in RULES.items()
        if entry.messages is not trained_factors and not (entry.personal or entry.alone)
    },
    "alternate fold": {
        "aggregation.rule": "alternate",
        "annealing.cooling.residual": "fold",
    },
    "freeze-a fold": {"aggregation.rule": "freeze-a", "annealing.cooling.residual": "fold"},
    "residual half way": {"method": "fedex-lora", "aggregation.server_optimizer.lr": 0.5},
    "mixed ranks": {"method": "flexlora", "clients.ranks": {1: 0.5, 4: 0.5}},
    "mixed ranks annealed": {"aggregation.rule": "zero-pad", "clients.ranks": [1, 2, 4]},
    "mixed ranks stacked": {"aggregation.rule": "stacking", "clients.ranks": [1, 2, 4]},
    "no head": {"adapter.train_head": False},
}
SCHEDULED = [
    "round",
    "stage",
    "rank",
    "trainable_params",
    "learning_rate",
    "clients",
    "bytes_up",
    "bytes_down",
    "bytes_base",
]


def make_recipe(overrides: dict[str, Any]) -> Recipe:
    return load_recipe(RECIPE, overrides)


def table(plan: planning.Plan) -> pd.DataFrame:
    return pd.DataFrame([vars(planned) for planned in plan.rounds])[SCHEDULED]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_sends_exactly_what_its_plan_says(name: str, tmp_path: Path) -> None:
    recipe = make_recipe(METHODS[name])
    plan = planning.plan(recipe)
    result = launch.run(recipe, str(tmp_path))
    assert plan.totals.communication() == result.summary["communication"]
    pd.testing.assert_frame_equal(
        table(plan).astype({"rank": float}),
        result.rounds[SCHEDULED].astype({"rank": float}),
        check_dtype=False,
    )


def test_half_a_step_of_the_server_leaves_more_for_residual_to_send() -> None:
    # Of rank 1, so that factors are smaller than the matrix.
    one = {"annealing.heating.rank": 1, "annealing.cooling.rank": 1}
    half = planning.plan(make_recipe({**METHODS["residual half way"], **one})).totals
    whole = planning.plan(make_recipe({"method": "fedex-lora", **one})).totals
    assert half.bytes_down > whole.bytes_down
    assert half.bytes_up == whole.bytes_up


def test_the_bill_of_the_stages_is_that_of_the_model_counted_by_hand() -> None:
    planned = planning.plan(make_recipe({}))
    # class token 16, positions 5 * 16, patches 16 * 16 + 16; one layer; last norm; 10 classes
    layer = 4 * (16 * 16 + 16) + 2 * 32 + (24 * 16 + 24) + (16 * 24 + 16)
    head = 16 * 10 + 10
    model = 16 + 5 * 16 + (16 * 16 + 16) + layer + 32 + head
    assert planned.outline.shape.total_params == model
    # One full round, then rank 4, 4, then half and all of the way to 1: floor(2.5 + 0.5) = 3.
    ranks = [4, 4, 3, 1, 1]
    # A rank costs two modules (query, value) 16 + 16 values each; every value has 4 bytes.
    sent = [model, *(rank * 2 * (16 + 16) + head for rank in ranks)]
    assert [r.rank for r in planned.rounds] == [None, *ranks]
    assert [r.bytes_up for r in planned.rounds] == [3 * 4 * values for values in sent]
    assert [r.bytes_down for r in planned.rounds] == [3 * 4 * values for values in sent]
    total = 2 * 3 * 4 * sum(sent)
    fedavg = 6 * 2 * 3 * 4 * model
    assert planned.totals.communication()["reduction_vs_fedavg"] == 1 - total / fedavg


def test_fedavg_saves_nothing_against_itself() -> None:
    bill = planning.plan(make_recipe({"method": "fedavg"})).totals.communication()
    assert bill["reduction_vs_fedavg"] == 0.0
    assert bill["bytes_base"] == 0


def test_a_fold_sends_the_factors_from_before_the_cut() -> None:
    drop = planning.plan(make_recipe({})).rounds
    fold = planning.plan(make_recipe({"annealing.cooling.residual": "fold"})).rounds
    # Rank 4 before the cut to 3, rank 3 before the cut to 1: 1 and 2 ranks more of 2 * 32 values
    # down to each of 3 clients.
    more = [f.bytes_down - d.bytes_down for f, d in zip(fold, drop, strict=True)]
    assert more == [0, 0, 0, 3 * 4 * 1 * 64, 3 * 4 * 2 * 64, 0]
    assert [f.bytes_up for f in fold] == [d.bytes_up for d in drop]


def test_with_spectral_allocation_the_plan_is_an_upper_bound(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"annealing.allocation": "spectral", "adapter.target_modules": "all-linear"}
    )
    planned, done = planning.plan(recipe), launch.run(recipe, str(tmp_path)).rounds
    assert (done["bytes_up"] <= table(planned)["bytes_up"]).all()
    assert list(done["learning_rate"]) == list(table(planned)["learning_rate"])


def test_with_acceptance_the_plan_takes_every_proposal() -> None:
    always = planning.plan(make_recipe({"data.validation_fraction": 0.1}))
    target = planning.plan(
        make_recipe({"annealing.acceptance": "target", "data.validation_fraction": 0.1})
    )
    assert target.rounds == always.rounds


def test_the_plan_knows_the_data_it_was_made_for() -> None:
    outline = planning.plan(make_recipe({})).outline
    # scikit-learn's 1797 digits: ceil(0.2 * 1797) = 360 are kept for the test.
    assert (outline.devices.sizes.sum(), len(outline.devices.sizes)) == (90, 6)
    assert outline.test_examples == 360
    assert outline.label_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, "this process, each 1 CPU"),
        ({"runtime.client_actors": 2}, "this process, up to 2 threads, each 1 CPU"),
        ({"runtime.executor": "ray"}, "client actors: 1 to 3 (auto), each 1 CPU"),
        (
            {
                "runtime.executor": "ray",
                "runtime.client_actors": 1,
                "runtime.cpus_per_actor": 4,
                "runtime.threads_per_actor": 2,
            },
            "client actors: 1, each 4 CPU; on CPUs each trains 2 blocks at once",
        ),
        (
            {
                "runtime.executor": "ray",
                "runtime.device": "auto",
                "runtime.client_actors": 2,
                "runtime.gpus_per_actor": 0.25,
            },
            "client actors: 2, each 1 CPU and 0.25 GPU where the cluster has GPUs",
        ),
    ],
)
def test_the_plan_says_what_it_needs_of_the_cluster(
    overrides: dict[str, Any], expected: str
) -> None:
    assert planning.plan(make_recipe(overrides)).needs[0] == expected


def test_a_column_and_a_trace_decide_the_simulated_clock(tmp_path: Path) -> None:
    # Clients a, b, c of 2, 3 and 4 training images at 1, 2 and 4 images a second, by column.
    owners = ["a"] * 2 + ["b"] * 3 + ["c"] * 4
    pace = {"a": 1.0, "b": 2.0, "c": 4.0}
    rows = 9
    image = pa.array([[[0.0] * 4] * 4] * rows)
    own = pa.table(
        {
            "image": image,
            "label": [0, 1, 2] * 3,
            "owner": owners,
            "pace": [pace[owner] for owner in owners],
        }
    )
    source = tmp_path / "images.parquet"
    parquet.write_table(own, source)
    trace = tmp_path / "times.csv"
    trace.write_text("client,start_s,end_s\na,0,100\nb,0,0.5\nc,0,100\n")
    recipe = load_recipe(
        {
            "data": {
                "source": str(source),
                "test_fraction": 0.34,
                "partition": {"kind": "column", "column": "owner"},
            },
            "model": {
                "config": {
                    "architecture": "vit",
                    "hidden_size": 8,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 1,
                    "intermediate_size": 8,
                    "patch_size": 2,
                }
            },
            "annealing": {
                "mode": "fixed",
                "heating": {"rounds": 1, "rank": 4},
                "initiating": {"rounds": 0},
                "cooling": {"rounds": 0},
                "holding": {"rounds": 0},
            },
            "clients": {
                "per_round": 1.0,
                "local_epochs": 1,
                "speed": {"column": "pace"},
                "availability": str(trace),
            },
        }
    )
    found = planning.plan(recipe)
    sizes = found.outline.devices.sizes.tolist()
    assert found.outline.devices.columns["pace"].tolist() == [1.0, 2.0, 4.0]
    # Client b is away after half a second, before it has trained its one or more images.
    (only,) = found.rounds
    assert (only.clients, only.arriving) == (3, 2)
    assert only.simulated_s == max(sizes[0] / 1.0, sizes[2] / 4.0)
