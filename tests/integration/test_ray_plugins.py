"""Own methods on Ray: what a run gives there is what it gives in one process."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.data.memory import read_memory
from rayfed_lora.plugins import data, model, objective, rule, sampler
from tests.fakes import RECIPE, FakeFactory

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session", "forgotten_methods"),
    # Tune's loggers leave the files of unfinished trials open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ON_RAY = {"runtime.executor": "ray", "runtime.client_actors": 2, "runtime.cohort_size": 1}
HERE = {"runtime.cohort_size": 1}
MODULE = "own_methods_on_ray"
SOURCE = '''
    """A rule of a module that only the driver's working directory has."""
    from rayfed_lora.plugins import rule

    @rule()
    def smallest(start, updates, *, plus: float = 0.0):
        """The smallest value of each client."""
        return {name: tensor.min(axis=0) + plus for name, tensor in updates.tensors.items()}
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield MODULE
    sys.modules.pop(MODULE, None)


def written_here() -> list[object]:
    """Return a rule, a sampler and an objective that no module can be imported for."""

    @rule("largest-of-a-test")
    def largest(start, updates, *, share: float = 0.5):
        return {
            n: share * t.max(axis=0) + (1 - share) * start[n] for n, t in updates.tensors.items()
        }

    @sampler("last-of-a-test")
    def last(pool, wanted, history, rng):
        del rng
        return pool[np.argsort(history.rounds[pool], kind="stable")[:wanted]]

    @objective("counting-of-a-test", memory={"rounds": ()}, message={"rounds": ()})
    class Counting:
        def after(self, done):
            counted = {"rounds": done.memory["rounds"] + np.float32(1)}
            return counted, counted

    return [largest(share=0.25), last(), Counting()]


def test_methods_of_a_script_give_on_two_actors_what_they_give_here(tmp_path):
    plugins = written_here()
    found = {}
    for name, settings in {"ray": ON_RAY, "here": HERE}.items():
        recipe = rayfed_lora.Recipe.load(RECIPE).with_(settings)
        run = rayfed_lora.run(recipe, str(tmp_path / name), plugins=plugins, factory=FakeFactory())
        found[name] = run.summary
    assert found["ray"]["adapter_sha256"] == found["here"]["adapter_sha256"]
    assert found["ray"]["communication"] == found["here"]["communication"]


@pytest.mark.e2e
def test_a_module_that_workers_do_not_find_by_themselves_is_used_in_a_comparison(module, tmp_path):
    methods = {"own": {"method": "fedlora", "aggregation.rule": "smallest"}, "fedlora": {}}
    compared = {}
    for name, settings in {"ray": ON_RAY, "here": HERE}.items():
        compared[name] = rayfed_lora.compare(
            RECIPE,
            methods,
            str(tmp_path / name),
            settings=settings,
            plugins=[module],
            factory=FakeFactory(),
        ).runs
    same = ["method", "final_loss", "total_bytes", "adapter_sha256"]
    assert compared["ray"][same].equals(compared["here"][same])
    own, plain = compared["ray"]["adapter_sha256"]
    assert own != plain
    assert (tmp_path / "ray" / "own" / "seed-0" / "plugins.json").exists()


def test_a_search_draws_the_option_of_an_own_method(module, tmp_path):
    space = {
        "parameters": {"aggregation.plus": {"choice": [0.0, 1.0]}},
        "objectives": {"eval_loss": "min"},
        "scheduler": "none",
        "search": "grid",
    }
    settings = {**ON_RAY, "runtime.client_actors": 1, "aggregation.rule": "smallest"}
    result = rayfed_lora.tune(
        space,
        RECIPE,
        str(tmp_path / "search"),
        settings=settings,
        plugins=[module],
        factory=FakeFactory(),
    )
    for _, row in result.trials.iterrows():
        drawn = {"aggregation.rule": "smallest", "aggregation.plus": row["aggregation.plus"]}
        recipe = rayfed_lora.load_recipe(RECIPE, {**HERE, **drawn}, plugins=[module])
        alone = rayfed_lora.run(
            recipe, str(tmp_path / f"{row['aggregation.plus']}"), factory=FakeFactory()
        )
        assert alone.summary["final"]["eval_loss"] == row["eval_loss"]
    assert result.trials["eval_loss"].nunique() == 2


def own_rows_and_model() -> list[object]:
    """Return a data set and a model that no module can be imported for."""

    @data("rows-of-a-test")
    def rows(rng, *, count: int = 60):
        pixels = rng.integers(256, size=(count, 4, 4)).astype(np.uint8)
        return pd.DataFrame({"image": list(pixels), "label": np.arange(count) % 3})

    @model("linear-of-a-test")
    def linear(channels, height, width, classes, *, hidden: int = 5):
        from torch import nn

        pixels = channels * height * width
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.Linear(hidden, classes))

    return [rows(count=48), linear(hidden=6)]


def test_own_rows_and_an_own_model_give_on_one_and_two_actors_what_they_give_here(tmp_path):
    plugins = own_rows_and_model()
    values = {
        "name": "own",
        "data": {"partition": {"kind": "iid", "clients": 4}},
        "adapter": {"target_modules": ["net.1"]},
        "annealing": {
            "initiating": {"rounds": 1},
            "heating": {"rounds": 1, "rank": 2},
            "cooling": {"rounds": 1, "rank": 1},
            "holding": {"rounds": 0},
        },
        "clients": {"per_round": 3, "local_steps": 2, "batch_size": 4},
    }
    recipe = rayfed_lora.load_recipe(values, HERE, plugins=plugins)
    frame = pd.DataFrame(
        {"image": [np.full((4, 4), i, np.uint8) for i in range(60)], "label": np.arange(60) % 3}
    )
    for data_name, rows in {"own": None, "frame": frame}.items():
        hashes = {}
        for way, settings in {
            "thread": {"runtime.executor": "local", "runtime.client_actors": 1},
            "threads": {"runtime.executor": "local", "runtime.client_actors": 2},
            "one actor": {**ON_RAY, "runtime.client_actors": 1},
            "two actors": ON_RAY,
        }.items():
            place = str(tmp_path / data_name / way)
            run = rayfed_lora.run(recipe.with_(settings), place, plugins=plugins, data=rows)
            hashes[way] = run.summary["adapter_sha256"]
        assert len(set(hashes.values())) == 1, hashes


class Reading(FakeFactory):
    """A factory whose workload needs the rows that the driver was handed."""

    def workload(self, recipe):
        found = read_memory(recipe.data.source, ("label",))
        assert found.train["label"].to_pylist() == [0, 1, 2]
        return super().workload(recipe)


def test_rows_in_memory_reach_the_workers(tmp_path):
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, 2]})
    recipe = rayfed_lora.Recipe.load(RECIPE).with_(ON_RAY)
    run = rayfed_lora.run(recipe, str(tmp_path / "run"), data=frame, factory=Reading())
    assert len(run.rounds) == 6
    methods = {"a": {}, "b": {"method": "fedlora"}}
    compared = rayfed_lora.compare(
        recipe, methods, str(tmp_path / "compared"), data=frame, factory=Reading()
    )
    assert compared.runs["error"].isna().all()
