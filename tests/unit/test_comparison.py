"""Several methods and seeds on one recipe: tables, going on, failures."""

from __future__ import annotations

import json
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.errors import BadInputError, InterruptedRunError, RecipeError, RunError
from rayfed_lora.launching import comparison_server
from rayfed_lora.launching.cells import cells_of
from rayfed_lora.launching.compare import compare
from rayfed_lora.pages.comparison_tables import Comparison, Standing
from tests.fakes import RECIPE, Behaviour, FakeFactory, every_round

METHODS = ["sa-fedlora", "fedavg", "flora"]


def compared(out: Path, methods: list[str] = METHODS, **others: Any) -> Comparison:
    return compare(RECIPE, methods, str(out), (0, 1), **{"factory": FakeFactory(), **others})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("comparison")
    return compared(out), out


def test_every_method_runs_with_every_seed_in_a_folder_of_its_own(whole):
    comparison, out = whole
    ran = list(zip(comparison.runs["method"], comparison.runs["seed"], strict=True))
    assert sorted(ran) == sorted((m, s) for m in METHODS for s in (0, 1))
    for method, seed in ran:
        folder = out / method / f"seed-{seed}"
        recipe = rayfed_lora.load_recipe(folder / "recipe.yaml")
        assert (recipe.method, recipe.seed) == (method, seed)
        assert (folder / "summary.json").exists()


def test_a_run_of_a_comparison_is_the_run_that_one_gets_alone(whole, tmp_path):
    comparison, _ = whole
    alone = rayfed_lora.run(
        rayfed_lora.load_recipe(RECIPE, {"method": "flora", "seed": 1}),
        str(tmp_path),
        factory=FakeFactory(),
    )
    runs = comparison.runs.set_index(["method", "seed"])
    assert runs.loc[("flora", 1), "adapter_sha256"] == alone.summary["adapter_sha256"]
    assert runs.loc[("flora", 1), "final_accuracy"] == alone.summary["final"]["eval_accuracy"]
    assert runs.loc[("flora", 1), "total_bytes"] == alone.summary["communication"]["total_bytes"]


@pytest.mark.parametrize(
    ("methods", "settings"),
    [
        # The recipe's own rule averages factors, which clients of several ranks have not alike.
        (["flexlora", "hetlora"], {"clients.ranks": [2, 3]}),
        # Alone it would heat to less than it cools to.
        (["fedavg", "fedlora"], {"annealing.cooling.rank": 2, "annealing.heating.rank": 1}),
    ],
)
def test_what_a_comparison_sets_need_only_go_with_its_methods(methods, settings):
    with pytest.raises(RecipeError):
        rayfed_lora.load_recipe(RECIPE, settings)
    cells = cells_of(RECIPE, methods, [0], "out", settings)
    assert [cell.method for cell in cells] == methods


def test_methods_have_mean_and_deviation_over_seeds(whole):
    comparison, _ = whole
    assert comparison.methods["method"].tolist() == METHODS
    assert comparison.methods["runs"].tolist() == [2, 2, 2]
    for _, row in comparison.methods.iterrows():
        own = comparison.runs[comparison.runs["method"] == row["method"]]
        assert row["final_loss_mean"] == pytest.approx(own["final_loss"].mean())
        assert row["final_loss_std"] == pytest.approx(own["final_loss"].std())
        mb = own["total_bytes"] / 1e6
        assert row["accuracy_per_mb_mean"] == pytest.approx((own["final_accuracy"] / mb).mean())
    fedavg = comparison.methods.set_index("method").loc["fedavg"]
    assert fedavg["reduction_vs_fedavg_mean"] == 0.0


def test_rounds_of_all_runs_know_what_was_sent_so_far(whole):
    comparison, _ = whole
    assert len(comparison.rounds) == 6 * 6
    for _, own in comparison.rounds.groupby(["method", "seed"]):
        sent = (own["bytes_up"] + own["bytes_down"]).cumsum()
        assert own["bytes_so_far"].tolist() == sent.tolist()


def test_the_target_is_looked_for_round_by_round(whole):
    comparison, _ = whole
    assert comparison.target == pytest.approx(0.95 * comparison.rounds["eval_accuracy"].max())
    for _, run in comparison.runs.iterrows():
        rounds = comparison.rounds
        own = rounds[(rounds["method"] == run["method"]) & (rounds["seed"] == run["seed"])]
        reached = own[own["eval_accuracy"] >= comparison.target]
        if reached.empty:
            assert pd.isna(run["rounds_to_target"])
        else:
            assert run["rounds_to_target"] == reached["round"].iloc[0] + 1
            assert run["bytes_to_target"] == reached["bytes_so_far"].iloc[0]
    assert comparison.runs["rounds_to_target"].notna().any()


def test_a_target_that_nobody_reaches_has_no_rounds(whole, tmp_path):
    _, out = whole
    copy = shutil.copytree(out, tmp_path / "copy")
    comparison = compared(copy, target=2.0)
    assert comparison.runs["rounds_to_target"].isna().all()
    assert comparison.methods["bytes_to_target_mean"].isna().all()


@pytest.mark.parametrize("name", ["runs", "methods", "rounds"])
def test_tables_are_written_as_parquet_and_csv(whole, name):
    comparison, out = whole
    table = getattr(comparison, name)
    read = pd.read_parquet(out / f"{name}.parquet").drop(columns="ranks", errors="ignore")
    written = table.drop(columns="ranks", errors="ignore")
    assert read.columns.tolist() == written.columns.tolist()
    same = (read == written) | (read.isna() & written.isna())
    assert same.all(axis=None)
    assert len(pd.read_csv(out / f"{name}.csv")) == len(table)


def test_called_again_it_runs_nothing_twice(whole, monkeypatch):
    comparison, out = whole

    def run(*arguments: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(comparison_server, "simulate", run)
    again = compared(out)
    pd.testing.assert_frame_equal(again.runs, comparison.runs)


def test_a_comparison_that_was_stopped_goes_on(tmp_path, whole):
    seen: list[Standing] = []

    def stop_in_the_second(standing: Standing) -> None:
        seen.append(standing)
        if len(standing.ended) == 1 and standing.status.rounds_done == 2:
            raise InterruptedRunError("stopped by the test")

    with pytest.raises(InterruptedRunError):
        compared(tmp_path, watch=stop_in_the_second)
    assert (tmp_path / METHODS[0] / "seed-0" / "summary.json").exists()
    comparison = compared(tmp_path)
    expected, _ = whole
    same = ["method", "seed", "final_loss", "total_bytes", "adapter_sha256"]
    pd.testing.assert_frame_equal(comparison.runs[same], expected.runs[same])


def test_more_methods_and_seeds_can_be_added_later(tmp_path):
    compared(tmp_path, ["fedlora"])
    comparison = compared(tmp_path, ["fedlora", "rolora"])
    assert len(comparison.runs) == 4


@pytest.mark.parametrize("name", ["partition.parquet", "summary.json", "adapter/fake.json"])
def test_damaged_files_of_a_finished_run_are_written_again(name, tmp_path):
    one = lambda: compare(RECIPE, METHODS[:2], str(tmp_path), factory=FakeFactory())  # noqa: E731
    expected = one()
    path = tmp_path / METHODS[1] / "seed-0" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    again = one()
    assert again.runs["error"].isna().all()
    assert again.runs["adapter_sha256"].tolist() == expected.runs["adapter_sha256"].tolist()
    assert name == "summary.json" or path.read_bytes() == content


@pytest.mark.parametrize("name", ["rounds.parquet", "clients.parquet"])
def test_a_run_with_a_lost_table_is_named_first_and_the_others_get_theirs(name, tmp_path, capsys):
    compare(RECIPE, METHODS[:2], str(tmp_path), factory=FakeFactory())
    path = tmp_path / METHODS[0] / "seed-0" / name
    path.write_bytes(path.read_bytes()[:-1])
    told: list[str] = []

    def watch(standing: Standing) -> None:
        told.append(capsys.readouterr().err)

    again = compare(RECIPE, METHODS, str(tmp_path), factory=FakeFactory(), watch=watch)
    # Before the new method is trained.
    assert f"{METHODS[0]}/seed-0 is left out:" in told[0]
    assert f"{name} is damaged" in told[0]
    errors = again.runs.set_index("method")["error"]
    assert f"{name} is damaged" in errors[METHODS[0]]
    assert errors[METHODS[1:]].isna().all()
    assert pd.read_parquet(tmp_path / "methods.parquet")["method"].tolist() == METHODS[1:]
    assert f"{name} is damaged" in (tmp_path / "report.html").read_text()


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    factory = FakeFactory(Behaviour(failing=every_round(*range(6))))
    with pytest.raises(RunError, match="no run of the comparison finished") as raised:
        compared(tmp_path / "all", factory=factory)
    assert "none of 3 clients sent a usable update" in str(raised.value)
    compare(RECIPE, ["fedlora"], str(tmp_path / "one"), (0,), factory=FakeFactory())
    comparison = compare(
        RECIPE, ["fedlora", "fedavg"], str(tmp_path / "one"), (0,), factory=factory
    )
    errors = comparison.runs.set_index("method")["error"]
    assert pd.isna(errors["fedlora"])
    assert "none of 3 clients" in errors["fedavg"]
    assert comparison.methods["method"].tolist() == ["fedlora"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert "none of 3 clients" in page
    # Once the reason is gone, it is run.
    mended = compare(
        RECIPE, ["fedlora", "fedavg"], str(tmp_path / "one"), (0,), factory=FakeFactory()
    )
    assert mended.runs["error"].isna().all()


@pytest.mark.parametrize(
    ("methods", "seeds", "error", "said"),
    [
        ([], (0,), BadInputError, "--methods: expected at least one"),
        (["fedavg", "fedavg"], (0,), BadInputError, "none twice"),
        (["fedavg"], (), BadInputError, "--seeds"),
        (["fedavgg"], (0,), RecipeError, "did you mean 'fedavg'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    methods, seeds, error, said, tmp_path
):
    with pytest.raises(error) as raised:
        compare(RECIPE, methods, str(tmp_path / "out"), seeds, factory=FakeFactory())
    assert said in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_recipe_is_refused(whole):
    _, out = whole
    with pytest.raises(BadInputError, match=r"holds a run of another recipe.*clients\.per_round"):
        compared(out, settings={"clients.per_round": 2})


@pytest.mark.parametrize(("name", "kind"), [("recipe.yaml", "a run"), ("search.yaml", "a search")])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_was(name, kind, tmp_path):
    (tmp_path / name).write_text("kept: 1")
    (tmp_path / "rounds.parquet").write_text("kept")
    with pytest.raises(BadInputError, match=f"expected a folder for a comparison, it holds {kind}"):
        compared(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, "rounds.parquet"}
    assert (tmp_path / "rounds.parquet").read_text() == "kept"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "annealing.heating.rank",
            2,
            {"sa-fedlora": 2, "fedlora": 2, "head-only": 0, "bitfit": 0, "own": 1},
        ),
        (
            "aggregation.rule",
            "product-svd",
            {"sa-fedlora": "product-svd", "flora": "stacking", "fedlora": "factor-average"},
        ),
        (
            "annealing.initiating.proximal_weight",
            0.5,
            {"sa-fedlora": 0.5, "fedavg": 0.0, "fedprox": 0.01},
        ),
    ],
)
def test_a_setting_of_all_leaves_what_sets_a_method_apart(key, value, expected, tmp_path):
    methods = {name: {"method": name} for name in expected if name != "own"}
    if "own" in expected:
        methods["own"] = {"method": "fedlora", key: 1}
    cells = cells_of(RECIPE, methods, [0], str(tmp_path), {key: value})
    assert {cell.method: attrgetter(key)(cell.recipe) for cell in cells} == expected


def test_a_recipe_without_a_first_stage_runs_as_long_under_every_method(tmp_path):
    none = {"annealing.initiating.trainable": "none", "annealing.initiating.rounds": 2}
    recipe = rayfed_lora.load_recipe(RECIPE, none)
    methods = ["sa-fedlora", "spd-cfl", "fedavg", "fedlora"]
    for given in (recipe, recipe.model_dump()):
        cells = cells_of(given, methods, [0], str(tmp_path))
        assert len({cell.recipe.annealing.total_rounds for cell in cells}) == 1
    cells = cells_of(RECIPE, methods, [0], str(tmp_path), none)
    assert len({cell.recipe.annealing.total_rounds for cell in cells}) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"sa-fedlora": 0.1, "spd-cfl": 0.1, "fedavg": 0.1, "own": 0.2}),
        ({"data.validation_fraction": 0.3}, {"spd-cfl": 0.3, "fedavg": 0.3, "own": 0.2}),
        ({}, {"sa-fedlora": 0.0, "fedavg": 0.0}),
    ],
)
def test_all_methods_hold_out_what_one_of_them_needs(settings, expected, tmp_path):
    methods = {name: {"method": name} for name in expected}
    if "own" in expected:
        methods["own"] = {"method": "fedlora", "data.validation_fraction": 0.2}
    cells = cells_of(RECIPE, methods, [0, 1], str(tmp_path), settings)
    assert len(cells) == 2 * len(expected)
    for cell in cells:
        assert cell.recipe.validation_fraction == expected[cell.method]


def test_presets_are_themselves_whatever_the_recipe_has(tmp_path):
    adam = {"aggregation.server_optimizer.name": "adam", "adapter.train_biases": True}
    methods = ["sa-fedlora", "fedavg", "fedprox", "head-only", "bitfit"]
    recipes = {c.method: c.recipe for c in cells_of(RECIPE, methods, [0], str(tmp_path), adam)}
    steps = {name: r.aggregation.server_optimizer for name, r in recipes.items()}
    assert (steps["sa-fedlora"].name, steps["sa-fedlora"].lr) == ("adam", 0.01)
    for name in ("fedavg", "fedprox"):
        assert (steps[name].name, steps[name].lr) == ("sgd", 1.0)
    assert not recipes["head-only"].adapter.train_biases
    assert recipes["bitfit"].adapter.train_biases


def test_a_first_stage_of_adapters_does_not_train_at_the_full_models_rate(tmp_path):
    methods, rate = ["sa-fedlora", "spd-cfl"], {"annealing.initiating.lr": 1e-4}
    cells = cells_of(RECIPE, methods, [0], str(tmp_path), rate)
    assert [cell.recipe.annealing.initiating.lr for cell in cells] == [1e-4, None]


def test_clients_own_examples_and_models_have_columns(tmp_path):
    settings = {"evaluation.client_fraction": 0.2}
    found = compared(tmp_path, ["fedlora", "fedsa-lora"], settings=settings)
    runs = found.runs.set_index(["method", "seed"])
    for method, seed in runs.index:
        folder = tmp_path / method / f"seed-{seed}"
        summary = json.loads((folder / "summary.json").read_text())["clients"]
        row = runs.loc[(method, seed)]
        assert row["clients_accuracy"] == summary["accuracy_mean"]
        assert row["clients_accuracy_worst_tenth"] == summary["accuracy_worst_tenth"]
        own = summary.get("personal_accuracy_mean")
        assert (own is None) == (method == "fedlora")
        assert own is None or row["personal_accuracy"] == own
    means = found.methods.set_index("method")["personal_accuracy_mean"]
    assert means.isna().tolist() == [True, False]


def test_variants_of_ones_own_have_names_and_overrides(tmp_path):
    variants = {
        "high": {"method": "fedlora"},
        "low": {"method": "fedlora", "annealing.heating.rank": 1},
    }
    comparison = compare(RECIPE, variants, str(tmp_path), factory=FakeFactory())
    assert comparison.methods["method"].tolist() == ["high", "low"]
    sent = comparison.methods.set_index("method")["total_bytes_mean"]
    # Six rounds of three clients, both ways: 17 values a rank, and 6 of the head; rank 3 and 1.
    assert sent.tolist() == [4 * 36 * (17 * rank + 6) for rank in (3, 1)]
    assert (tmp_path / "low" / "seed-0" / "summary.json").exists()


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
def test_a_name_that_is_no_folder_is_refused(name, tmp_path):
    with pytest.raises(BadInputError, match="methods"):
        cells_of(RECIPE, {name: {"method": "fedlora"}}, [0], str(tmp_path))


def test_settings_may_be_texts_as_on_the_command_line(tmp_path):
    (cell,) = cells_of(RECIPE, ["flora"], [3], str(tmp_path), ["clients.per_round=2"])
    assert (cell.recipe.clients.per_round, cell.recipe.seed) == (2, 3)
    assert cell.recipe.aggregation.rule == "stacking"
