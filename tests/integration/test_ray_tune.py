"""Searches on Ray: whole trials, ended early, failing, perturbed, stopped and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.errors import BadInputError, InterruptedRunError, ResourceError, RunError
from rayfed_lora.pages.search_page import SearchNews
from rayfed_lora.tuning.search_result import SearchResult
from rayfed_lora.tuning.tune import tune
from tests.fakes import RECIPE, Behaviour, FakeFactory

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    # Tune's loggers leave the files of unfinished trials open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ON_RAY = {"runtime.executor": "ray", "runtime.client_actors": 1, "runtime.cohort_size": 1}
RANKS = {
    "parameters": {"annealing.heating.rank": {"choice": [2, 4]}},
    "objectives": {"eval_loss": "min", "total_bytes": "min"},
    "scheduler": "none",
    "search": "grid",
}


def searched(out: Path, space: Any = RANKS, **others: Any) -> SearchResult:
    given = {"settings": ON_RAY, "factory": FakeFactory(), **others}
    return tune(space, RECIPE, str(out), **given)


def by_rank(result: SearchResult) -> pd.DataFrame:
    return result.trials.set_index("annealing.heating.rank")


@pytest.fixture(scope="module")
def whole(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return searched(tmp_path_factory.mktemp("search"))


def test_a_trial_is_the_run_that_one_gets_alone(whole, tmp_path):
    for rank, row in by_rank(whole).iterrows():
        settings = {"annealing.heating.rank": rank, "runtime.cohort_size": 1}
        recipe = rayfed_lora.load_recipe(RECIPE, settings)
        alone = rayfed_lora.run(recipe, str(tmp_path / str(rank)), factory=FakeFactory())
        kept = json.loads(Path(row["location"], "summary.json").read_text())
        assert kept["adapter_sha256"] == alone.summary["adapter_sha256"]
        assert row["eval_loss"] == alone.summary["final"]["eval_loss"]
        assert row["total_bytes"] == alone.summary["communication"]["total_bytes"]
        assert row["status"] == "finished"


def test_best_recipes_are_taken_by_run_as_they_are(whole, tmp_path):
    frugal = by_rank(whole)["total_bytes"].idxmin()
    assert frugal == 2
    assert whole.best["total_bytes"] == by_rank(whole).loc[2, "trial"]
    recipe = rayfed_lora.load_recipe(Path(whole.location, "best-total_bytes.yaml"))
    assert recipe.annealing.heating.rank == 2
    again = rayfed_lora.run(
        rayfed_lora.load_recipe(recipe.model_dump(), {"runtime.executor": "local"}),
        str(tmp_path),
        factory=FakeFactory(),
    )
    assert again.summary["communication"]["total_bytes"] == by_rank(whole).loc[2, "total_bytes"]
    first = Path(whole.location, "best-eval_loss.yaml").read_text()
    assert Path(whole.location, "best.yaml").read_text() == first
    assert Path(whole.location, "best-knee.yaml").exists()


def test_tables_front_and_report_are_written(whole, tmp_path):
    kept = pd.read_parquet(Path(whole.location, "trials.parquet"))
    assert kept["trial"].tolist() == whole.trials["trial"].tolist()
    assert set(kept.loc[kept["on_front"], "trial"]) == set(whole.front["trial"])
    assert Path(whole.location, "plots", "front.pdf").stat().st_size > 0
    page = Path(whole.location, "report.html").read_text()
    assert "parcoords" in page and "2 trials: 2 finished" in page
    again = rayfed_lora.report([whole.location], str(tmp_path / "again.html"))
    assert "2 trials: 2 finished" in Path(again).read_text()
    with pytest.raises(BadInputError, match="a search alone"):
        rayfed_lora.report([whole.location, whole.location])


@pytest.mark.e2e
def test_data_and_base_are_prepared_once_for_all_trials(whole, tmp_path):
    log = tmp_path / "prepared"
    log.touch()
    searched(tmp_path / "out", factory=FakeFactory(log=str(log)))
    assert log.read_text() == "workload\n"


def test_a_failing_trial_is_recorded_and_the_search_goes_on(whole, tmp_path):
    space = {
        **RANKS,
        "parameters": {"aggregation.rule": {"choice": ["factor-average", "no-such-rule"]}},
    }
    told: list[SearchNews] = []
    result = searched(tmp_path / "bad", space, watch=told.append)
    assert any(n.ended is not None and "aggregation.rule" in n.ended[1] for n in told)
    assert any(n.warning is not None and "about 500 of 1,000 draws" in n.warning for n in told)
    found = result.trials.set_index("aggregation.rule")
    assert found["status"].to_dict() == {"factor-average": "finished", "no-such-rule": "failed"}
    assert "aggregation.rule" in found.loc["no-such-rule", "error"]
    page = Path(tmp_path / "bad" / "report.html").read_text()
    assert "no-such-rule" in page and "1 failed" in page


@pytest.mark.e2e
def test_a_search_whose_trials_all_fail_says_why(tmp_path):
    raising = FakeFactory(Behaviour(raising=frozenset((client, 2) for client in range(6))))
    with pytest.raises(RunError, match="was told to raise"):
        searched(tmp_path, factory=raising)


@pytest.mark.e2e
def test_a_trial_whose_client_actor_dies_ends_as_if_it_had_not(whole, tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    dying = Behaviour(dying=frozenset((client, 3) for client in range(6)), marker=str(marker))
    found = searched(tmp_path / "out", factory=FakeFactory(dying))
    assert not marker.exists()
    assert by_rank(found)["eval_loss"].equals(by_rank(whole)["eval_loss"])
    assert found.trials["warnings"].sum() == 1


@pytest.mark.e2e
@pytest.mark.parametrize("scheduler", ["asha", pytest.param("median", marks=pytest.mark.e2e)])
def test_trials_end_early_and_are_not_compared(scheduler, tmp_path):
    space = {
        "parameters": {"clients.per_round": {"choice": [1, 2, 3, 4, 5, 6]}},
        "objectives": {"eval_loss": "min"},
        "scheduler": scheduler,
        "samples": 8,
    }
    found = searched(tmp_path, space, max_concurrent=1)
    early = found.trials[found.trials["status"] == "ended early"]
    assert len(early) > 0 and (early["round"] < 6).all() and not early["on_front"].any()
    assert set(found.trials["status"]) == {"finished", "ended early"}
    for row in early.to_dict("records"):
        assert len(pd.read_parquet(Path(row["location"], "rounds.parquet"))) == row["round"]


POPULATION = {
    "parameters": {
        "annealing.cooling.rank": {"choice": [1, 2, 3]},
        "clients.optimizer.lr": {"uniform": [0.01, 0.1]},
    },
    "objectives": {"eval_loss": "min"},
    "scheduler": "pbt",
    "samples": 4,
}


@pytest.mark.e2e
def test_a_population_goes_on_without_a_trial_that_fails(tmp_path):
    rules = {"choice": ["factor-average", "no-such-rule"]}
    space = {**POPULATION, "parameters": {**POPULATION["parameters"], "aggregation.rule": rules}}
    found = searched(tmp_path, space)
    assert set(found.trials["status"]) == {"finished", "failed"}


@pytest.mark.e2e
def test_a_population_that_was_stopped_late_goes_on(tmp_path):
    def interrupt(news: SearchNews) -> None:
        if max(news.running.values(), default=0) >= 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        searched(tmp_path, POPULATION, watch=interrupt)
    found = searched(tmp_path, POPULATION, resume=True)
    assert found.trials["status"].tolist() == ["finished"] * 4


@pytest.mark.e2e
def test_a_search_that_was_killed_before_its_first_trial_runs_all_of_them(tmp_path):
    space = {**RANKS, "search": "random", "samples": 3}
    searched(tmp_path, space)
    for left in (tmp_path / "tune").glob("experiment_state-*"):
        left.unlink()
    shutil.rmtree(tmp_path / "trials")
    assert len(searched(tmp_path, space, resume=True).trials) == 3


@pytest.mark.e2e
def test_pbt_changes_the_rest_of_a_run_and_not_its_past(tmp_path):
    # Slowly, so that the trials are beside each other.
    slow = FakeFactory(Behaviour(sleep_s=dict.fromkeys(range(6), 0.3)))
    found = searched(tmp_path, POPULATION, factory=slow)
    assert found.trials["status"].tolist() == ["finished"] * 4
    changed = [Path(row) for row in found.trials["location"] if Path(row, "changes.json").exists()]
    assert changed
    for folder in changed:
        rounds = pd.read_parquet(folder / "rounds.parquet")
        assert rounds["round"].tolist() == list(range(6))
        after = json.loads((folder / "changes.json").read_text())[-1]
        recipe = rayfed_lora.load_recipe(folder / "recipe.yaml")
        assert recipe.clients.optimizer.lr == after["settings"]["clients.optimizer.lr"]
        later = rounds["round"] >= after["after_round"]
        assert (rounds.loc[later, "learning_rate"] == recipe.clients.optimizer.lr).all()


@pytest.mark.e2e
def test_optuna_searches_for_two_objectives(tmp_path):
    space = {
        "parameters": {"annealing.cooling.rank": {"randint": [1, 3]}},
        "objectives": {"eval_loss": "min", "total_bytes": "min"},
        "scheduler": "none",
        "search": "optuna",
        "samples": 3,
    }
    found = searched(tmp_path, space)
    assert found.trials["status"].tolist() == ["finished"] * 3


@pytest.mark.e2e
def test_sigint_keeps_what_is_done_and_resume_finishes_it(whole, tmp_path):
    def interrupt(news: SearchNews) -> None:
        if news.ended is not None:
            os.kill(os.getpid(), signal.SIGINT)

    slow = FakeFactory(Behaviour(sleep_s=dict.fromkeys(range(6), 0.1)))
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError, match="--resume"):
        searched(out, factory=slow, max_concurrent=1, watch=interrupt)
    first = list(out.glob("trials/*/summary.json"))
    assert len(first) == 1
    interim = pd.read_parquet(out / "trials.parquet")["status"].tolist()
    assert "finished" in interim and set(interim) <= {"finished", "unfinished"}
    before = first[0].stat().st_mtime_ns
    with pytest.raises(BadInputError, match="holds a search already"):
        searched(out)
    other = {"settings": {**ON_RAY, "clients.per_round": 2}, "max_concurrent": 2}
    with pytest.raises(BadInputError, match=r"differ: search, clients\.per_round, max_concurrent"):
        searched(out, resume=True, search="random", **other)
    found = searched(out, resume=True)
    assert first[0].stat().st_mtime_ns == before
    assert by_rank(found)["eval_loss"].equals(by_rank(whole)["eval_loss"])


def test_a_trial_that_can_never_start_is_refused(tmp_path):
    with pytest.raises(ResourceError, match="cannot hold 9 client actors"):
        searched(tmp_path / "out", settings={**ON_RAY, "runtime.client_actors": 9})
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_trials_share_gpus_by_fractions(tmp_path):
    shares = {"runtime.device": "auto", "runtime.gpus_per_actor": 0.5}
    found = searched(tmp_path, settings={**ON_RAY, **shares})
    devices = {
        json.loads(Path(row, "adapter", "fake.json").read_text())["gpus"]
        for row in found.trials["location"]
    }
    assert found.trials["status"].tolist() == ["finished"] * 2
    # Each actor sees the one GPU that its half is of.
    assert devices and devices <= {"0", "1"}
