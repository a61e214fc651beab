"""Recipes: what is accepted, what is refused and how, and how layers win over each other."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

import rayfed_lora
from rayfed_lora import errors
from rayfed_lora.errors import ClientError, Fault, RecipeError
from rayfed_lora.recipe.loading import (
    load_recipe,
    recipe_schema,
    recipe_yaml,
    shipped_names,
    shipped_text,
)
from rayfed_lora.recipe.plain_values import merged
from rayfed_lora.recipe.presets import PRESETS
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml

VIT: dict[str, Any] = {"model": {"config": {"architecture": "vit"}}}

CONTRACT = """
name: digits-vit
seed: 0
method: sa-fedlora
data:
  source: digits
  test_fraction: 0.2
  partition: {kind: dirichlet, alpha: 0.5, clients: 100, min_examples: 4}
model:
  task: image-classification
  source: config
  config:
    architecture: vit
    hidden_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    intermediate_size: 128
    image_size: 8
    patch_size: 2
    num_channels: 1
adapter: {target_modules: auto, alpha: 16, dropout: 0.0, scaling: constant, train_head: true}
annealing:
  initiating: {rounds: 2, trainable: full, proximal_weight: 0.01}
  heating: {rounds: 4, rank: 16, shape: hold}
  cooling: {rounds: 10, rank: 2, shape: cosine, residual: drop}
  holding: {rounds: 4}
  allocation: uniform
  acceptance: always
aggregation: {rule: factor-average, server_optimizer: {name: sgd, lr: 1.0}}
clients:
  per_round: 20
  local_steps: 5
  batch_size: 16
  optimizer: {name: sgd, lr: 0.05, momentum: 0.0, weight_decay: 0.0}
evaluation: {every: 1, batch_size: 256}
runtime: {executor: ray, client_actors: auto, gpus_per_actor: auto, cpus_per_actor: 1,
  cohort_size: auto, threads_per_actor: 1, precision: fp32}
storage: {path: null, checkpoint_every: 1, keep: 2}
"""


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def with_values(*pairs: tuple[str, Any]) -> dict[str, Any]:
    """Return a complete recipe with these values at these key paths."""
    recipe = VIT
    for path, value in pairs:
        recipe = merged(recipe, nested(path, value))
    return recipe


def at(recipe: Recipe, path: str) -> Any:
    node: Any = recipe
    for key in path.split("."):
        node = node[key] if isinstance(node, Mapping) else getattr(node, key)
    return node


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def faults(source: Any, overrides: Any = ()) -> dict[str, Fault]:
    """Return the faults of a refused recipe by path; two of one path would be a bug."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    by_path = {fault.path: fault for fault in caught.value.faults}
    assert len(by_path) == len(caught.value.faults)
    for fault in caught.value.faults:
        assert str(fault) in str(caught.value)
    return by_path


# What is accepted.


def test_every_key_of_the_contract_is_accepted_as_it_stands_there(tmp_path):
    path = tmp_path / "digits-vit.yaml"
    path.write_text(CONTRACT, "utf-8")
    recipe = load_recipe(path)
    written = dict(leaves(parse_yaml("contract", CONTRACT)))
    # head 3, data 6, model 10, adapter 5, annealing 13, aggregation 3, clients 7, evaluation 2,
    # runtime 7, storage 3
    assert len(written) == 59
    for key, value in written.items():
        assert at(recipe, key) == value, key


@pytest.mark.parametrize(
    ("key", "values"),
    [
        (
            "data.source",
            ["x.parquet", "s3://bucket/x.csv", "x.jsonl", "x.arrow", "hf:ylecun/mnist"],
        ),
        ("data.partition.kind", ["iid", "dirichlet", "shards", "quantity"]),
        ("model.task", ["image-classification", "text-classification"]),
        ("model.source", ["package:tiny-model", "./folder", "google/vit-base-patch16-224"]),
        ("adapter.target_modules", ["all-linear", ["query", "value"], r".*\.(query|value)"]),
        ("adapter.scaling", ["constant", "alpha_over_rank", "rslora"]),
        ("adapter.train_head", [True, False]),
        ("annealing.initiating.trainable", ["full", "adapter", "none"]),
        ("annealing.heating.shape", ["hold", "ramp"]),
        (
            "annealing.cooling.shape",
            ["linear", "cosine", "cubic", "exponential", "logarithmic", "step", "constant"],
        ),
        ("annealing.cooling.residual", ["drop", "fold"]),
        ("annealing.cooling.rank", [0, 16]),
        ("annealing.allocation", ["uniform", "spectral"]),
        ("annealing.acceptance", ["always", "metropolis", "target"]),
        ("aggregation.rule", ["factor-average", "product-svd"]),
        ("clients.per_round", [1, 100, 0.2, 1.0]),
        ("clients.local_epochs", [1, 3]),
        ("clients.optimizer.name", ["sgd", "adamw"]),
        ("clients.optimizer.lr", [1, 0.001]),
        ("runtime.executor", ["ray", "local"]),
        ("runtime.client_actors", ["auto", 1]),
        ("runtime.gpus_per_actor", ["auto", 0, 0.25, 0.0001, 1]),
        ("runtime.cpus_per_actor", [0.5, 4]),
        ("runtime.cohort_size", ["auto", 1]),
        ("runtime.precision", ["fp32", "bf16"]),
        ("storage.path", [None, "runs/a", "s3://bucket/runs"]),
    ],
)
def test_every_alternative_of_the_contract_is_accepted(key, values):
    for value in values:
        recipe = load_recipe(with_values((key, value)))
        assert at(recipe, key) == value
        assert type(at(recipe, key)) in (type(value), float)


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("name", "run"),
        ("seed", 0),
        ("method", "sa-fedlora"),
        ("adapter.scaling", "constant"),
        ("adapter.target_modules", "auto"),
        ("annealing.mode", "staged"),
        ("annealing.heating.shape", "hold"),
        ("annealing.cooling.residual", "drop"),
        ("annealing.allocation", "uniform"),
        ("annealing.acceptance", "always"),
        ("annealing.target.value", None),
        ("aggregation.rule", "factor-average"),
        ("aggregation.server_optimizer.name", "sgd"),
        ("aggregation.server_optimizer.lr", 1.0),
        ("storage.path", None),
    ],
)
def test_what_is_not_written_has_the_default_of_the_method(key, default):
    assert at(load_recipe(VIT), key) == default


@pytest.mark.parametrize(
    ("pairs", "scaling"),
    [
        ([], "alpha_over_rank"),
        ([("method", "spd-cfl")], "alpha_over_rank"),
        ([("method", "fedlora")], "constant"),
        ([("clients.optimizer.name", "sgd")], "constant"),
        ([("adapter.scaling", "rslora")], "rslora"),
        ([("adapter.scaling", "constant")], "constant"),
    ],
)
def test_falling_ranks_keep_the_learning_rate_of_adamw_unless_written(pairs, scaling):
    adamw = with_values(("clients.optimizer.name", "adamw"))
    assert load_recipe(adamw, dict(pairs)).adapter.scaling == scaling
    # A resolved recipe says what it was given as if the user had written it.
    resolved = load_recipe(adamw).model_dump()
    expected = "alpha_over_rank" if pairs == [("clients.optimizer.name", "sgd")] else scaling
    assert load_recipe(resolved, dict(pairs)).adapter.scaling == expected


def options(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, info in kind.model_fields.items():
        yield f"{prefix}{name}", info.description
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from options(info.annotation, f"{prefix}{name}.")


def test_every_option_has_a_description():
    every = dict(options(Recipe))
    assert {key for key, _ in leaves(parse_yaml("contract", CONTRACT))} - set(every) == {
        f"model.config.{key}" for key in parse_yaml("", CONTRACT)["model"]["config"]
    }
    assert [key for key, description in every.items() if not (description or "").strip()] == []


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(VIT).clients.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("per_round", "clients", "cohort"),
    [
        (20, 100, 20),
        (0.2, 100, 20),
        (0.25, 10, 3),  # 2.5, half up
        (0.001, 100, 1),  # 0.1, but never nobody
        (1.0, 7, 7),
        (1, 7, 1),
    ],
)
def test_a_cohort_is_a_count_or_a_share_of_all_clients(per_round, clients, cohort):
    assert load_recipe(with_values(("clients.per_round", per_round))).cohort_size(clients) == cohort


@pytest.mark.parametrize(
    ("pairs", "steps"),
    [
        ([], 5),
        ([("clients.local_steps", 7)], 7),
        ([("clients.local_epochs", 2)], None),
    ],
)
def test_local_work_is_five_steps_unless_written(pairs, steps):
    assert load_recipe(with_values(*pairs)).clients.steps == steps


@pytest.mark.parametrize(
    ("pairs", "share"),
    [
        ([], 0.0),
        ([("annealing.acceptance", "metropolis")], 0.1),
        ([("annealing.acceptance", "target")], 0.1),
        # Where ranks never fall nothing is proposed.
        ([("annealing.acceptance", "target"), ("method", "fedlora")], 0.0),
        ([("data.validation_fraction", 0.3)], 0.3),
        ([("data.validation_fraction", 0.0)], 0.0),
    ],
)
def test_validation_examples_are_kept_where_the_annealing_needs_them(pairs, share):
    assert load_recipe(with_values(*pairs)).validation_fraction == share


@pytest.mark.parametrize(
    ("pairs", "lr"),
    [
        ([], 1.0),
        ([("aggregation.server_optimizer.name", "momentum")], 1.0),
        ([("aggregation.server_optimizer.name", "adam")], 0.01),
        ([("aggregation.server_optimizer.name", "yogi")], 0.01),
        (
            [
                ("aggregation.server_optimizer.name", "yogi"),
                ("aggregation.server_optimizer.lr", 0.5),
            ],
            0.5,
        ),
        ([("method", "fedavg"), ("aggregation.server_optimizer.name", "adam")], 0.01),
    ],
)
def test_a_server_optimiser_has_a_rate_of_its_kind_unless_written(pairs, lr):
    assert load_recipe(with_values(*pairs)).aggregation.server_optimizer.lr == lr


# What is refused.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", "a b"),
        ("name", "../up"),
        ("seed", -1),
        ("seed", 1.0),
        ("data.test_fraction", 0.0),
        ("data.test_fraction", 1.0),
        ("data.validation_fraction", 1.0),
        ("data.validation_fraction", "some"),
        ("data.max_examples", 0),
        ("data.max_length", 0),
        ("data.labels", [1.5]),
        ("data.partition.kind", "random"),
        ("data.partition.alpha", 0),
        ("data.partition.alpha", float("inf")),
        ("data.partition.clients", 0),
        ("data.partition.min_examples", -1),
        ("data.partition.shards_per_client", 0),
        ("adapter.alpha", 0),
        ("adapter.dropout", 1.0),
        ("adapter.dropout", -0.1),
        ("adapter.dropout", float("nan")),
        ("adapter.train_head", "yes"),
        ("adapter.target_modules", 5),
        ("annealing.initiating.rounds", -1),
        ("annealing.initiating.proximal_weight", -0.1),
        ("annealing.initiating.proximal_weight", float("inf")),
        ("annealing.initiating.lr", 0),
        ("annealing.heating.rank", -1),
        ("annealing.heating.rank", 2.5),
        ("annealing.heating.rank", True),
        ("annealing.cooling.steps", 0),
        ("annealing.temperature", 0.0),
        ("annealing.temperature_decay", 0.0),
        ("annealing.temperature_decay", 1.1),
        ("annealing.target.tolerance", -0.1),
        ("aggregation.server_optimizer.lr", 0),
        ("clients.per_round", 0),
        ("clients.per_round", 0.0),
        ("clients.per_round", 1.5),
        ("clients.per_round", "20"),
        ("clients.per_round", True),
        ("clients.local_steps", 0),
        ("clients.local_epochs", 0),
        ("clients.batch_size", 16.0),
        ("clients.optimizer.lr", "0.05"),
        ("clients.optimizer.lr", float("nan")),
        ("clients.optimizer.momentum", 1.0),
        ("clients.optimizer.weight_decay", -0.1),
        ("clients.max_grad_norm", 0),
        ("clients.max_failed", -1),
        ("clients.max_failed", 1.0),
        ("clients.over_select", 0.9),
        ("clients.over_select", 1001.0),
        ("clients.speed.sigma", 1000.0),
        ("clients.deadline_s", 0),
        ("clients.availability.dropout", 1.0),
        ("clients.speed.sigma", -1.0),
        ("clients.speed", "fast"),
        ("network.latency_s", -0.1),
        ("runtime.block_timeout_s", 0),
        ("runtime.scale_up_s", 0),
        ("clients.lr_schedule.final_factor", 0),
        ("clients.lr_schedule.warmup_rounds", -1),
        ("evaluation.every", 0),
        ("runtime.client_actors", 0),
        ("runtime.gpus_per_actor", -1),
        ("runtime.cpus_per_actor", 0),
        ("runtime.threads_per_actor", 0),
        ("runtime.start_timeout_s", 0),
        ("storage.checkpoint_every", 0),
        ("storage.keep", 0),
        ("data", 5),
        ("clients", None),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_the_one_fault(key, value):
    found = faults(with_values((key, value)))
    assert list(found) == [key]
    assert found[key].came is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_that_no_metric_can_hold_is_refused(value):
    assert list(faults(with_values(("annealing.target.value", value)))) == [
        "annealing.target.value"
    ]


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("aggregation.rule", "factor-averag", "factor-average"),
        ("method", "fedavgg", "fedavg"),
        ("annealing.cooling.shape", "cosin", "cosine"),
        ("runtime.executor", "rai", "ray"),
    ],
)
def test_a_misspelt_value_is_answered_with_the_nearest_one(key, value, nearest):
    fault = faults(with_values((key, value)))[key]
    assert fault.nearest == nearest
    assert fault.came == f'"{value}"'
    assert str(fault).endswith(f"got \"{value}\" (did you mean '{nearest}'?)")


def test_a_value_that_resembles_nothing_has_no_nearest():
    assert (
        faults(with_values(("annealing.cooling.shape", "zzz")))["annealing.cooling.shape"].nearest
        is None
    )


def test_an_empty_name_is_not_answered_with_an_empty_suggestion():
    assert faults(with_values(("name", "")))["name"].nearest is None


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("annealing.heatin", "annealing.heating"),
        ("annealing.cooling.rnk", "annealing.cooling.rank"),
        ("clients.batchsize", "clients.batch_size"),
        ("sead", "seed"),
        ("per_round", "clients.per_round"),  # right name, wrong place
        ("data.optimizer", "clients.optimizer"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(key, nearest):
    fault = faults(with_values((key, 1)))[key]
    assert fault.nearest == nearest
    assert "unknown key" in fault.expected
    assert fault.came is None


def test_an_unknown_key_that_resembles_nothing_lists_the_keys_known_there():
    fault = faults(with_values(("xyzzyq", 1)))["xyzzyq"]
    assert fault.nearest is None
    fault = faults(with_values(("storage.xyzzyq", 1)))["storage.xyzzyq"]
    assert fault.expected == "unknown key; known here: path, checkpoint_every, keep, adapters_every"


def test_an_unknown_key_is_not_answered_with_the_section_that_it_stands_in():
    assert faults(with_values(("storage.xyzzyq", 1)))["storage.xyzzyq"].nearest is None


def test_an_unknown_key_is_answered_from_its_own_section_first():
    assert faults(with_values(("clients.lr", 0.1)))["clients.lr"].nearest == "clients.optimizer.lr"


def test_a_missing_model_is_named():
    found = faults({"name": "x"})
    assert str(found["model"]) == "model: this key is required, and is missing"


@pytest.mark.parametrize(
    ("pairs", "path", "words"),
    [
        (
            [("clients.per_round", 11), ("data.partition.clients", 10)],
            "clients.per_round",
            ["clients.per_round", "data.partition.clients", "10", "11"],
        ),
        (
            [("annealing.cooling.rank", 17)],
            "annealing.cooling.rank",
            ["cooling.rank", "heating.rank", "16", "17"],
        ),
        (
            [("clients.local_steps", 5), ("clients.local_epochs", 1)],
            "clients.local_epochs",
            ["local_steps", "local_epochs", "got both"],
        ),
        (
            [("annealing.acceptance", "metropolis"), ("annealing.cooling.residual", "fold")],
            "annealing.acceptance",
            ["metropolis", "fold"],
        ),
        ([("data.partition.kind", "column")], "data.partition.column", ["column"]),
        (
            [("runtime.gpus_per_actor", 1.5)],
            "runtime.gpus_per_actor",
            ["gpus_per_actor", "at most 1", "1.5"],
        ),
        (
            [("runtime.gpus_per_actor", 0.00015)],
            "runtime.gpus_per_actor",
            ["gpus_per_actor", "0.0001"],
        ),
        (
            [("runtime.gpus_per_actor", 0), ("runtime.device", "cuda")],
            "runtime.gpus_per_actor",
            ["cuda", "gpus_per_actor"],
        ),
        (
            [(f"annealing.{s}.rounds", 0) for s in ("initiating", "heating", "cooling", "holding")],
            "annealing.heating.rounds",
            ["at least one round"],
        ),
        (
            [
                ("annealing.initiating.trainable", "none"),
                *[(f"annealing.{s}.rounds", 0) for s in ("heating", "cooling", "holding")],
            ],
            "annealing.heating.rounds",
            ["at least one round"],
        ),
        (
            [("data.validation_fraction", 0.0), ("annealing.acceptance", "target")],
            "data.validation_fraction",
            ["annealing.acceptance", "target", "data.validation_fraction"],
        ),
        (
            [("annealing.acceptance", "target"), ("annealing.heating.rounds", 0)],
            "annealing.target.value",
            ["target.value", "heating.rounds"],
        ),
        (
            [("evaluation.clients_every", 2)],
            "evaluation.client_fraction",
            ["clients_every", "above 0"],
        ),
        ([("clients.deadline_s", 5.0)], "clients.deadline_s", ["clients.speed", "network"]),
        (
            [("clients.availability", {"period_s": 60.0})],
            "clients.availability.period_s",
            ["expected a trace"],
        ),
        (
            [("clients.speed", {"sigma": 0.5})],
            "clients.speed",
            ["lognormal", "median", "none of them"],
        ),
        (
            [("network.up_mbps", {"distribution": "uniform", "low": 1.0})],
            "network.up_mbps",
            ["uniform", "low and high", "got low"],
        ),
        (
            [("network.down_mbps", {"distribution": "uniform", "low": 3.0, "high": 2.0})],
            "network.down_mbps.low",
            ["at most high (2)", "got 3"],
        ),
        (
            [("clients.speed", {"column": "pace", "sigma": 0.5})],
            "clients.speed.sigma",
            ["expected 0", "median", "got 0.5"],
        ),
        (
            [("clients.speed", {"median": 1.0, "column": "pace"})],
            "clients.speed",
            ["median, column"],
        ),
        ([("runtime.scale_up_s", 60.0)], "runtime.scale_up_s", ["client_actors", "device", "auto"]),
        (
            [("annealing.holding.rounds", 10**7)],
            "annealing.holding.rounds",
            ["at most 100,000 rounds in all stages together", "got 10,0"],
        ),
        ([("model.config", {})], "model.config.architecture", ["config.architecture"]),
        ([("model.config.architecture", 3)], "model.config.architecture", ["config.architecture"]),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_both_named(pairs, path, words):
    found = faults(with_values(*pairs) if not path.startswith("model") else nested(*pairs[0]))
    assert list(found) == [path]
    assert [word for word in words if word not in str(found[path])] == []


@pytest.mark.parametrize(
    "pairs",
    [
        [("clients.per_round", 100)],
        [("annealing.holding.rounds", 90_000)],
        [("annealing.cooling.rank", 16)],
        [("annealing.cooling.rank", 17), ("annealing.mode", "fixed")],
        [("annealing.cooling.rank", 17), ("annealing.mode", "full")],
        [("data.partition.kind", "column"), ("data.partition.column", "author")],
        [
            ("data.partition.kind", "column"),
            ("data.partition.column", "author"),
            ("clients.per_round", 500),  # how many clients there are is in the data
        ],
        [("annealing.acceptance", "target"), ("annealing.cooling.residual", "fold")],
        [
            ("annealing.acceptance", "target"),
            ("annealing.heating.rounds", 0),
            ("annealing.target.value", 0.9),
        ],
    ],
)
def test_values_at_the_border_of_going_together_are_accepted(pairs):
    recipe = load_recipe(with_values(*pairs))
    for key, value in pairs:
        assert at(recipe, key) == value


def test_holding_cannot_be_at_a_higher_rank_than_heating():
    found = faults(with_values(("annealing.cooling.rounds", 0), ("annealing.cooling.rank", 32)))
    assert list(found) == ["annealing.cooling.rank"]


# All faults at once.


def test_one_error_lists_every_fault_of_a_recipe_and_no_other():
    found = faults(
        {
            "sead": 1,
            "name": "a b",
            "method": "fedsgd",
            "data": {"test_fraction": 2, "partition": {"kind": "column", "alpha": -1}},
            "model": {"source": "config", "config": {"architecture": "vit"}, "tsk": "x"},
            "annealing": {"heating": {"rank": "high"}, "cooling": {"shape": "cos", "rate": 1}},
            "clients": {"local_steps": 5, "local_epochs": 1},
            "runtime": {"gpus_per_actor": 1.5},
        }
    )
    assert sorted(found) == sorted(
        [
            "sead",
            "name",
            "method",
            "data.test_fraction",
            "data.partition.alpha",
            "data.partition.column",  # found behind alpha: the column has no name
            "model.tsk",
            "annealing.heating.rank",
            "annealing.cooling.shape",
            "annealing.cooling.rate",
            "clients.local_epochs",
            "runtime.gpus_per_actor",
        ]
    )


def test_the_message_counts_the_faults_and_says_that_nothing_was_started():
    with pytest.raises(RecipeError) as caught:
        load_recipe(with_values(("seed", -1), ("storage.keep", 0)))
    first, *lines = str(caught.value).splitlines()
    assert first == "recipe: 2 faults in the recipe; nothing was started"
    assert len(lines) == 2
    with pytest.raises(RecipeError, match="recipe: 1 fault in the recipe; nothing was started"):
        load_recipe(with_values(("seed", -1)))


def test_a_recipe_wide_fault_is_found_behind_a_faulty_value():
    pairs = [("seed", -1), ("clients.per_round", 200)]
    assert sorted(faults(with_values(*pairs))) == ["clients.per_round", "seed"]


def test_a_recipe_wide_fault_is_found_behind_a_missing_model():
    assert sorted(faults({"clients": {"per_round": 200}})) == ["clients.per_round", "model"]


def test_a_recipe_wide_fault_is_found_behind_a_fault_of_the_model():
    recipe = {"model": {"source": "config"}, "clients": {"per_round": 200}}
    assert sorted(faults(recipe)) == ["clients.per_round", "model.config.architecture"]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (
            [
                ("clients.per_round", 200),
                ("clients.local_steps", 5),
                ("clients.local_epochs", 1),
            ],
            ["local_epochs", "per_round"],
        ),
        (
            [
                ("clients.per_round", 200),
                ("data.validation_fraction", 0.0),
                ("annealing.acceptance", "target"),
            ],
            ["per_round", "validation_fraction"],
        ),
        (
            [
                ("annealing.cooling.rank", 17),
                ("annealing.cooling.residual", "fold"),
                ("annealing.acceptance", "metropolis"),
            ],
            ["heating.rank", "fold"],
        ),
    ],
    ids=["section and recipe", "recipe twice", "section twice"],
)
def test_every_cross_check_that_fails_is_listed(pairs, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(with_values(*pairs))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "pairs",
    [
        [("annealing.cooling.rank", -1), ("annealing.heating.rank", 1)],
        [("clients.per_round", 0), ("data.partition.clients", 5)],
    ],
    ids=["ranks", "cohort"],
)
def test_a_default_that_stands_in_for_a_faulty_value_makes_no_fault_of_its_own(pairs):
    assert list(faults(with_values(*pairs))) == [pairs[0][0]]


# YAML.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("0.05", 0.05),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("010", 10),  # 8 in YAML 1.1
        ("12:30:00", "12:30:00"),  # 45000 in YAML 1.1
    ],
)
def test_yaml_is_read_as_yaml_1_2(text, value):
    got = parse_yaml("test", f"key: {text}")["key"]
    assert got == value
    assert type(got) is type(value)


def test_a_learning_rate_in_exponent_form_is_a_number_in_files_and_in_set(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {config: {architecture: vit}}\nclients: {optimizer: {lr: 1e-3}}\n")
    assert load_recipe(path).clients.optimizer.lr == 0.001
    assert load_recipe(path, ["clients.optimizer.lr=5e-4"]).clients.optimizer.lr == 0.0005


@pytest.mark.parametrize(
    "text",
    ["seed: 1\nseed: 2\n", "clients: {per_round: 1, per_round: 2}\n", "a: [1\n", "a: b: c\n"],
)
def test_duplicate_keys_and_broken_yaml_are_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    fault = faults(path)["(file)"]
    assert fault.expected == "expected YAML"
    assert "line" in str(fault.came)


@pytest.mark.parametrize(("text", "came"), [("", "NoneType"), ("- a\n", "list"), ("5", "int")])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text, came):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert faults(path)["(file)"] == Fault("(file)", "expected a mapping of recipe keys", came)


def test_a_key_that_is_not_a_text_is_refused():
    assert "Keys should be strings" in str(faults({**VIT, 1: 2})["recipe"])


def test_a_file_that_is_missing_or_not_a_text_is_refused(tmp_path):
    binary = tmp_path / "r.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", binary, tmp_path):
        fault = faults(path)["RECIPE"]
        assert fault.expected == "a readable YAML file"
        assert path.name in str(fault.came)


def test_a_name_that_is_not_shipped_is_refused_with_all_shipped_names():
    for refused in (load_recipe, shipped_text):
        with pytest.raises(RecipeError) as caught:
            refused("no-such-recipe")
        (fault,) = caught.value.faults
        assert fault.came == "'no-such-recipe'"
        assert all(name in fault.expected for name in shipped_names())


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_is_sound_and_found_by_its_name(name):
    assert load_recipe(name) == load_recipe(parse_yaml(name, shipped_text(name)))


# Presets and --set.


def test_every_method_has_a_preset_with_known_keys_only():
    rules = (
        "fedlora ffa-lora flora flexlora hetlora fedex-lora rolora fedsa-lora lora-fair local-only"
    )
    others = "sa-fedlora fedavg fedprox scaffold feddyn spd-cfl head-only bitfit"
    assert set(PRESETS) == {*rules.split(), *others.split()}
    for method in PRESETS:
        assert load_recipe({**VIT, "method": method}).method == method


@pytest.mark.parametrize(
    ("method", "filled"),
    [
        ("sa-fedlora", {"annealing.mode": "staged", "annealing.initiating.trainable": "full"}),
        ("fedavg", {"annealing.mode": "full", "annealing.initiating.proximal_weight": 0.0}),
        ("fedprox", {"annealing.mode": "full", "annealing.initiating.proximal_weight": 0.01}),
        (
            "fedlora",
            {
                "annealing.mode": "fixed",
                "aggregation.rule": "factor-average",
                "annealing.allocation": "uniform",
                "annealing.acceptance": "always",
            },
        ),
        ("spd-cfl", {"annealing.mode": "staged", "annealing.acceptance": "target"}),
        ("scaffold", {"annealing.mode": "full", "clients.objective.name": "scaffold"}),
        ("feddyn", {"annealing.mode": "full", "clients.objective.name": "feddyn"}),
    ],
)
def test_a_preset_fills_in_what_sets_its_method_apart(method, filled):
    recipe = load_recipe({**VIT, "method": method})
    assert {key: at(recipe, key) for key in filled} == filled


def test_a_key_that_is_written_wins_over_the_preset():
    recipe = load_recipe(
        with_values(
            ("method", "fedlora"),
            ("aggregation.rule", "product-svd"),
            ("annealing.mode", "staged"),
        )
    )
    assert (recipe.aggregation.rule, recipe.annealing.mode) == ("product-svd", "staged")


def test_a_method_named_by_set_wins_over_what_the_file_writes():
    staged = with_values(
        ("annealing.mode", "staged"),
        ("annealing.initiating.proximal_weight", 0.5),
        ("annealing.acceptance", "metropolis"),
    )
    recipe = load_recipe(staged, ["method=fedavg"])
    assert recipe.method == "fedavg"
    assert recipe.annealing.mode == "full"
    assert recipe.annealing.initiating.proximal_weight == 0.0
    assert recipe.annealing.acceptance == "always"


def test_other_values_of_set_beat_everything_whatever_their_order():
    for overrides in (
        ["method=fedavg", "annealing.initiating.proximal_weight=0.3"],
        ["annealing.initiating.proximal_weight=0.3", "method=fedavg"],
    ):
        recipe = load_recipe(with_values(("annealing.initiating.proximal_weight", 0.5)), overrides)
        assert recipe.annealing.mode == "full"
        assert recipe.annealing.initiating.proximal_weight == 0.3


def test_set_with_the_files_own_method_leaves_what_the_file_writes():
    recipe = load_recipe(
        with_values(("method", "fedavg"), ("annealing.initiating.proximal_weight", 0.5)),
        ["method=fedavg"],
    )
    assert recipe.annealing.initiating.proximal_weight == 0.5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("fedavg", "sa-fedlora"),
        pytest.param("spd-cfl", "sa-fedlora"),
        pytest.param("spd-cfl", "fedlora"),
        ("fedprox", "sa-fedlora"),
        ("sa-fedlora", "fedavg"),
        ("sa-fedlora", "spd-cfl"),
        ("fedavg", "fedprox"),
    ],
)
def test_a_method_named_by_set_is_the_same_whatever_method_the_file_names(old, new):
    by_file = load_recipe({**VIT, "method": new})
    by_set = load_recipe({**VIT, "method": old}, [f"method={new}"])
    assert by_set == by_file


def test_values_of_set_are_yaml_and_may_be_given_as_a_mapping():
    texts = load_recipe(VIT, ["clients.per_round=0.5", "adapter.target_modules=[q, v]", "name=no"])
    values = load_recipe(
        VIT, {"clients.per_round": 0.5, "adapter.target_modules": ["q", "v"], "name": "no"}
    )
    assert texts == values
    assert (texts.clients.per_round, texts.adapter.target_modules) == (0.5, ["q", "v"])
    assert texts.name == "no"


def test_a_later_value_of_set_wins_and_siblings_stay():
    recipe = load_recipe(VIT, ["seed=1", "clients.batch_size=4", "seed=2", "clients.per_round=3"])
    assert (recipe.seed, recipe.clients.batch_size, recipe.clients.per_round) == (2, 4, 3)


@pytest.mark.parametrize("text", ["clients", "=3", " =3", "a..b=3", ".seed=1"])
def test_a_set_that_is_not_a_path_and_a_value_is_refused(text):
    assert faults(VIT, [text])["--set"].expected == "expected key.path=value"


def test_a_set_whose_value_is_not_yaml_is_refused_and_named():
    with pytest.raises(RecipeError, match=r"--set seed: expected YAML"):
        load_recipe(VIT, ["seed=[1"])


def test_faults_of_set_are_listed_like_those_of_the_file():
    found = faults(with_values(("storage.keep", 0)), ["nope=1", "clients.optimizer.lr=fast"])
    assert sorted(found) == ["clients.optimizer.lr", "nope", "storage.keep"]


@pytest.mark.parametrize(("first", "then"), [("flora", "sa-fedlora"), ("bitfit", "fedlora")])
def test_a_resolved_recipe_changes_its_method_as_the_written_one_does(first, then):
    written = {"name": "run", "model": {"config": {"architecture": "vit"}}, "method": first}
    resolved = parse_yaml("recipe.yaml", recipe_yaml(load_recipe(written)))
    changed = load_recipe(resolved, {"method": then})
    assert changed == load_recipe({**written, "method": then})


def test_ranks_with_shares_are_replaced_as_a_whole():
    recipe = load_recipe(
        {
            "model": {"config": {"architecture": "vit"}},
            "method": "flexlora",
            "clients": {"ranks": {4: 0.5, 16: 0.5}},
        },
        ["clients.ranks={8: 1.0}"],
    )
    assert recipe.clients.ranks == {8: 1.0}


def test_loading_leaves_the_mapping_and_the_presets_as_they_were():
    given = with_values(("method", "fedavg"), ("clients.per_round", 5))
    copy = pickle.loads(pickle.dumps(given))
    presets = pickle.loads(pickle.dumps({k: dict(v) for k, v in PRESETS.items()}))
    load_recipe(given, ["clients.batch_size=3", "annealing.initiating.proximal_weight=0.7"])
    assert given == copy
    assert presets == PRESETS


# Writing recipes.


@pytest.mark.parametrize("method", list(PRESETS))
def test_a_resolved_recipe_reads_back_as_the_same_recipe(tmp_path, method):
    recipe = load_recipe(
        with_values(
            ("method", method),
            ("name", "1e3"),
            ("clients.per_round", 1.0),
            ("clients.optimizer.lr", 1e-5),
            ("data.labels", [1, "no", "0x1F", "~"]),
            ("adapter.target_modules", r"^encoder\.(?:0|1)\..*: #x$"),
            ("model.config.note", "null"),
        )
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe), "utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert type(again.clients.per_round) is float
    assert again.name == "1e3"


def test_a_resolved_recipe_has_every_key_written_out_in_order():
    raw = parse_yaml("resolved", recipe_yaml(load_recipe(VIT)))
    assert list(raw) == list(Recipe.model_fields)
    assert list(raw["annealing"]["cooling"]) == ["rounds", "rank", "shape", "steps", "residual"]


def test_the_json_schema_accepts_resolved_recipes_and_the_contract():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for method in PRESETS:
        validator.validate(load_recipe({**VIT, "method": method}).model_dump(mode="json"))
    validator.validate(parse_yaml("contract", CONTRACT))


@pytest.mark.parametrize(
    "pair", [("sead", 1), ("clients.batch_size", 0), ("method", "x"), ("annealing.heating.rate", 1)]
)
def test_the_json_schema_refuses_what_loading_refuses(pair):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(recipe_schema()).validate(with_values(pair))


def test_refusing_a_recipe_imports_neither_torch_nor_transformers_nor_ray():
    code = """
import sys
from rayfed_lora.errors import RecipeError
from rayfed_lora.recipe.loading import load_recipe
try:
    load_recipe({"seed": -1})
except RecipeError:
    print("refused")
print(sorted({"torch", "transformers", "ray", "peft", "pandas"} & set(sys.modules)))
"""
    root = str(Path(rayfed_lora.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[:2] == ["refused", "[]"]


# Errors.


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.RayfedError, 1),
        (errors.BadInputError, 2),
        (errors.RecipeError, 2),
        (errors.DataError, 2),
        (errors.ModelError, 2),
        (errors.ResourceError, 2),
        (errors.RunFolderError, 2),
        (errors.RunError, 1),
        (errors.ClientError, 1),
        (errors.InterruptedRunError, 130),
    ],
)
def test_every_error_has_the_exit_status_of_the_command_line(kind, status):
    assert kind.exit_status == status
    assert issubclass(kind, errors.RayfedError)


def test_a_recipe_error_survives_a_process_border():
    error = RecipeError("r.yaml", [Fault("seed", "expected x", "-1"), Fault("a", "b", None, "c")])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RecipeError
    assert (again.source, again.faults) == (error.source, error.faults)
    assert str(again) == str(error)
    assert str(again).splitlines()[1:] == [
        "  seed: expected x, got -1",
        "  a: b (did you mean 'c'?)",
    ]


def test_a_client_error_survives_a_process_border_and_names_client_and_round():
    error = ClientError(7, 3, "Traceback ...\nValueError: nan\n")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ClientError
    assert (again.client, again.round_index, again.trace) == (7, 3, error.trace)
    assert str(again) == "client 7 failed in round 4:\nTraceback ...\nValueError: nan"


def test_a_recipe_without_a_version_is_of_the_first_and_a_newer_one_is_refused():
    assert load_recipe(VIT).version == 1
    assert "version: 1" in recipe_yaml(load_recipe(VIT))
    with pytest.raises(RecipeError, match="a newer rayfed-lora wrote this recipe; install that"):
        load_recipe({**VIT, "version": 2})
