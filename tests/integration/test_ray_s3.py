"""Runs and searches on Ray whose folders are in an object store."""

from __future__ import annotations

import os
import signal

import pytest

import rayfed_lora
from rayfed_lora.errors import InterruptedRunError
from rayfed_lora.pages.search_page import SearchNews
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.tune import tune
from tests.fakes import RECIPE, Behaviour, FakeFactory
from tests.integration.test_ray_tune import ON_RAY, POPULATION, RANKS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.e2e
def test_a_run_on_ray_is_the_one_of_a_local_folder(bucket, tmp_path):
    recipe = rayfed_lora.load_recipe(RECIPE, ON_RAY)
    one = rayfed_lora.run(recipe, bucket.uri("runs/a"), factory=FakeFactory())
    other = rayfed_lora.run(recipe, str(tmp_path / "a"), factory=FakeFactory())
    assert one.summary["adapter_sha256"] == other.summary["adapter_sha256"]
    assert RunFolder(bucket.uri("runs/a")).names("checkpoints")


@pytest.mark.e2e
def test_a_search_in_an_object_store_is_stopped_goes_on_and_is_reported(bucket):
    def interrupt(news: SearchNews) -> None:
        if news.ended is not None:
            os.kill(os.getpid(), signal.SIGINT)

    out, given = bucket.uri("searches/s"), {"settings": ON_RAY, "max_concurrent": 1}
    slow = FakeFactory(Behaviour(sleep_s=dict.fromkeys(range(6), 0.1)))
    with pytest.raises(InterruptedRunError, match=r"kept in s3://.*; --resume"):
        tune(RANKS, RECIPE, out, factory=slow, watch=interrupt, **given)
    folder = RunFolder(out)
    first = [t for t in folder.names("trials") if folder.exists(f"trials/{t}/summary.json")]
    assert len(first) == 1
    kept = folder.read(f"trials/{first[0]}/summary.json")
    found = tune(RANKS, RECIPE, out, factory=FakeFactory(), resume=True, **given)
    assert found.trials["status"].tolist() == ["finished"] * 2
    assert folder.read(f"trials/{first[0]}/summary.json") == kept
    assert {"tune", "trials.parquet", "best.yaml", "report.html", "plots"} <= {*folder.names()}
    assert rayfed_lora.report([out], bucket.uri("r.html"))
    best = parse_yaml("best", folder.read("best.yaml").decode())
    assert rayfed_lora.load_recipe(best).annealing.heating.rank in (2, 4)


@pytest.mark.e2e
def test_pbt_copies_runs_between_trials_in_an_object_store(bucket):
    slow = FakeFactory(Behaviour(sleep_s=dict.fromkeys(range(6), 0.3)))
    found = tune(POPULATION, RECIPE, bucket.uri("p"), settings=ON_RAY, factory=slow)
    assert found.trials["status"].tolist() == ["finished"] * 4
    folder = RunFolder(bucket.uri("p"))
    assert any(folder.exists(f"trials/{t}/changes.json") for t in folder.names("trials"))
