"""Tables, best recipes and report of a search, from run folders and what Tune knows."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.many_runs_display import show_search, watching_search
from rayfed_lora.engines.on_ray.placement import Layout, Node
from rayfed_lora.errors import ResourceError, RunError, RunFolderError
from rayfed_lora.pages.report import report
from rayfed_lora.pages.search_page import SearchNews, read_search
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.yaml_text import yaml_text
from rayfed_lora.runs import checksums, seals
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.draws import trial_recipe
from rayfed_lora.tuning.search_result import SearchResult, TrialOutcome
from rayfed_lora.tuning.space import load_space
from rayfed_lora.tuning.tuner import trial_layout
from tests.fakes import local_engine, make_recipe

SPACE = load_space(
    {
        "parameters": {
            "annealing.heating.rank": {"choice": [1, 2, 3]},
            "annealing.cooling.shape": {"choice": ["linear", 5]},
        },
        "objectives": {"eval_loss": "min", "total_bytes": "min"},
    }
)


def tried(out: Path, trial: str, rank: int) -> TrialOutcome:
    """Run a trial to its end."""
    draw = {"annealing.heating.rank": rank, "annealing.cooling.shape": "linear"}
    recipe = trial_recipe(SPACE, make_recipe(), draw)
    board = StatusBoard(recipe.annealing.total_rounds)
    summary = simulate(
        recipe,
        local_engine(recipe),
        RunFolder(out / "trials" / trial),
        board,
        lambda: False,
        resume=True,
    )
    metrics = {**summary["final"], "round": 6, "done": True}
    metrics["total_bytes"] = summary["communication"]["total_bytes"]
    return TrialOutcome(trial, draw, metrics)


@pytest.fixture
def found(tmp_path: Path) -> SearchResult:
    """Two finished trials, one ended early, a failed and an unfinished one."""
    bad = {"annealing.heating.rank": 3, "annealing.cooling.shape": 5}
    trials = [
        tried(tmp_path, "a", 3),
        tried(tmp_path, "b", 2),
        TrialOutcome("c", bad, {"round": None, "done": True, "total_bytes": 1, "eval_loss": 0.0}),
        TrialOutcome("d", bad, {}, "annealing.cooling.shape: expected a shape"),
        TrialOutcome("e", {}, {}),
    ]
    result = SearchResult.of(str(tmp_path), SPACE, make_recipe(), trials)
    content = {
        "space": SPACE.model_dump(mode="json"),
        "recipe": make_recipe().model_dump(mode="json"),
    }
    RunFolder(tmp_path).write("search.yaml", yaml_text(content).encode())
    result.write(SPACE)
    return result


def test_every_trial_has_a_row_and_only_finished_ones_are_compared(found):
    rows = found.trials.set_index("trial")
    assert rows["status"].to_dict() == {
        "a": "finished",
        "b": "finished",
        "c": "ended early",
        "d": "failed",
        "e": "unfinished",
    }
    assert rows.loc["d", "error"] == "annealing.cooling.shape: expected a shape"
    # The third has sent least, and would be on any front.
    assert not rows.loc["c", "on_front"]
    assert found.best["total_bytes"] == "b"
    assert rows["annealing.cooling.shape"].tolist()[:4] == ["linear", "linear", "5", "5"]
    assert rows.loc["a", "annealing.heating.rank"] == 3


def test_a_finished_trial_without_a_loss_is_on_no_front(found, tmp_path):
    rounds = tmp_path / "trials" / "a" / "rounds.parquet"
    table = pa.Table.from_pandas(pd.read_parquet(rounds).assign(eval_loss=math.nan))
    folder = RunFolder(rounds.parent)
    seals.write_table(folder, "rounds.parquet", table)
    sums = checksums.listed(folder) or {}
    checksums.write(
        folder, {**sums, "rounds.parquet": checksums.table_sha256(folder, "rounds.parquet")}
    )
    diverged = TrialOutcome("a", {}, {})
    again = [diverged, TrialOutcome("b", {}, dict(found.trials.iloc[1]))]
    result = SearchResult.of(str(tmp_path), SPACE, make_recipe(), again)
    assert result.front["trial"].tolist() == ["b"]


def test_a_trial_that_failed_before_it_saved_a_round_is_reported(found, tmp_path):
    failed = TrialOutcome("f", {}, {"round": 3}, "diverged")
    done = [TrialOutcome("a", {}, dict(found.trials.iloc[0])), failed]
    SearchResult.of(str(tmp_path), SPACE, make_recipe(), done).write(SPACE)
    assert "diverged" in (tmp_path / "report.html").read_text()


def test_a_finished_trial_is_what_its_folder_says(found, tmp_path):
    before = found.trials.iloc[0]
    stale = TrialOutcome("a", {}, {**before, "round": 4, "total_bytes": 1})
    result = SearchResult.of(str(tmp_path), SPACE, make_recipe(), [stale])
    row = result.trials.iloc[0]
    assert (row["round"], row["total_bytes"]) == (6, before["total_bytes"])


@pytest.mark.parametrize("name", ["rounds.parquet", "summary.json", "recipe.yaml"])
def test_a_damaged_finished_trial_is_named_in_the_table_and_costs_no_other(found, tmp_path, name):
    path = tmp_path / "trials" / "b" / name
    path.write_bytes(path.read_bytes()[:-1])
    trials = [TrialOutcome(trial, {}, dict(found.trials.iloc[i])) for i, trial in enumerate("ab")]
    result = SearchResult.of(str(tmp_path), SPACE, make_recipe(), trials)
    result.write(SPACE)
    rows = result.trials.set_index("trial")
    assert rows["status"].to_dict() == {"a": "finished", "b": "failed"}
    assert f"{name} is damaged" in rows.loc["b", "error"]
    assert set(result.best.values()) == {"a"}
    with pytest.raises(RunError, match="is damaged"):
        SearchResult.of(str(tmp_path), SPACE, make_recipe(), trials[1:])


def test_the_tables_are_written_into_the_folder_as_its_owner_writes_it(found, tmp_path):
    def lost() -> None:
        raise RunError("has lost it")

    with pytest.raises(RunError, match="has lost it"):
        found.write(SPACE, RunFolder(tmp_path).guarded(lost))


def test_the_tables_are_kept_and_best_recipes_say_what_they_are(found, tmp_path):
    kept = pd.read_parquet(tmp_path / "trials.parquet")
    assert kept["status"].tolist() == found.trials["status"].tolist()
    assert len(pd.read_csv(tmp_path / "trials.csv")) == 5
    text = (tmp_path / "best-total_bytes.yaml").read_text()
    assert text.startswith("# The best trial of a search by total_bytes: b\n# eval_loss: ")
    assert load_recipe(tmp_path / "best-total_bytes.yaml").annealing.heating.rank == 2
    assert (tmp_path / "plots" / "front.png").exists()


def test_a_changed_run_is_said_to_be_one_in_its_recipe(found, tmp_path):
    changes = tmp_path / "trials" / "b" / "changes.json"
    changes.write_text('[{"after_round": 2, "settings": {}}, {"after_round": 4, "settings": {}}]')
    found.write(SPACE)
    assert "they were others up to round 2, 4" in (tmp_path / "best-total_bytes.yaml").read_text()


def test_the_report_shows_trials_axes_and_failures(found, tmp_path):
    page = Path(report([str(tmp_path)], str(tmp_path / "page.html"))).read_text()
    assert "5 trials: 2 finished, 1 ended early, 1 failed, 1 unfinished" in page
    assert "parcoords" in page and "Pareto front" in page
    assert "expected a shape" in page
    assert read_search(RunFolder(tmp_path)).drawn == tuple(SPACE.drawn)


def test_a_damaged_search_is_named(found, tmp_path):
    (tmp_path / "search.yaml").write_text("space: {}\n")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_search(RunFolder(tmp_path))


def test_a_search_in_which_nothing_finished_says_why(tmp_path):
    failed: list[Any] = [TrialOutcome("a", {}, {}, "no data"), TrialOutcome("b", {}, {}, "no data")]
    with pytest.raises(
        RunError, match=r"no trial of the search finished with eval_loss, total_bytes\nno data$"
    ):
        SearchResult.of(str(tmp_path), SPACE, make_recipe(), failed)


@pytest.mark.parametrize(
    ("settings", "nodes", "at_once", "expected"),
    [
        # Two cores: one actor a trial, two trials.
        ({}, [Node(2, 0)], 3, (Layout(1, 1.0, 0.0), 2)),
        ({}, [Node(8, 0)], 2, (Layout(3, 1.0, 0.0), 2)),
        ({}, [Node(2, 0)], 16, (Layout(1, 1.0, 0.0), 2)),
        ({"client_actors": 2}, [Node(2, 0), Node(3, 0)], 9, (Layout(2, 1.0, 0.0), 2)),
        # Four actors share a GPU: four trials on it.
        (
            {"device": "auto", "gpus_per_actor": 0.25},
            [Node(8, 1)],
            6,
            (Layout(1, 1.0, 0.25), 4),
        ),
    ],
)
def test_trials_share_the_cluster(settings, nodes, at_once, expected):
    auto = {"runtime__client_actors": "auto"}
    auto |= {f"runtime__{key}": value for key, value in settings.items()}
    assert trial_layout(make_recipe(**auto), nodes, at_once) == expected


def test_a_trial_that_cannot_fit_is_refused():
    with pytest.raises(ResourceError, match="cannot hold 3 client actors"):
        trial_layout(make_recipe(runtime__client_actors=3), [Node(2, 0)], 1)


def test_a_search_is_shown_in_the_terminal(found):
    console, places = PlainConsole(file=io.StringIO(), width=120), list[str]()
    with watching_search(console, places) as watch:
        watch(SearchNews(location=found.location))
        watch(SearchNews(warning="draws are refused"))
        ended = ("a", "test accuracy 0.6 after 6 rounds")
        drawn = {"annealing.heating.rank": 8, "annealing.cooling.shape": "[cosine]"}
        watch(SearchNews(2, {"b": 3}, ended, done=1, rounds=6, drawn=drawn))
    show_search(console, found, SPACE.drawn)
    said = console.file.getvalue()
    assert places == [found.location]
    for part in (
        f"search: {found.location}",
        "warning: draws are refused",
        "trial a: test accuracy 0.6 after 6 rounds (heating rank 8, cooling shape [cosine])",
        "2 finished, 1 ended early, 1 failed, 1 unfinished",
        "best-knee.yaml",
        "failed: d: annealing.cooling.shape: expected a shape",
        f"best: rayfed-lora run {found.location}/best.yaml",
    ):
        assert part in said.replace("\n", " ") or part in said
