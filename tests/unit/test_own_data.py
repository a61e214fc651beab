"""Own data: functions that return rows, their options, and what a run keeps of them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import rayfed_lora
from rayfed_lora.data.dataset import load
from rayfed_lora.data.memory import source_of
from rayfed_lora.errors import DataError, PluginError, RecipeError, RunFolderError
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.plugins import data, registry
from rayfed_lora.plugins.tables import DATA
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.runs.claiming import kept_recipe
from rayfed_lora.runs.location import with_absolute_paths
from rayfed_lora.storage import RunFolder

pytestmark = pytest.mark.usefixtures("forgotten_methods")
TEXTS, IMAGES = "text-classification", "image-classification"
SMALL = {
    "data": {"partition": {"clients": 4, "kind": "iid"}, "test_fraction": 0.25},
    "model": {
        "config": {
            "architecture": "vit",
            "image_size": 4,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
    },
    "annealing": {
        "initiating": {"rounds": 0},
        "heating": {"rounds": 1, "rank": 2},
        "cooling": {"rounds": 1, "rank": 1},
        "holding": {"rounds": 0},
    },
    "clients": {"per_round": 2, "local_steps": 1, "batch_size": 4},
    "runtime": {"executor": "local"},
}


def rows_of(words, labels):
    return pd.DataFrame({"text": list(words), "label": list(labels)})


def with_images():
    """Register images of whole pixels: row i has i in all of its pixels but the first one."""

    @data("images-of-a-test")
    def images(rng, *, rows: int = 40, first: int = 0):
        pixels = np.arange(rows, dtype=np.uint8)[:, None, None] + np.zeros((1, 4, 4), np.uint8)
        pixels[:, 0, 0] = first
        return pd.DataFrame({"image": list(pixels), "label": np.arange(rows) % 2})

    return images


def test_options_stand_beside_the_source_and_reach_the_function():
    @data()
    def counted(rng, *, rows: int = 6, word: str = "w"):
        return rows_of([f"{word}{i}" for i in range(rows)], [0, 1] * (rows // 2))

    chosen = Data.model_validate({"source": "counted", "rows": 8, "test_fraction": 0.5})
    found = load(chosen, TEXTS, 0, 0.0)
    texts = {*found.train["text"].to_pylist(), *found.test["text"].to_pylist()}
    assert texts == {f"w{i}" for i in range(8)}

    @data()
    def others(rng, *, rows: int = 4):
        return rows_of("abcd"[:rows], [0, 1] * (rows // 2))

    # Options are those of `source`: of a source of tests they have their defaults.
    both = Data.model_validate({"source": "counted", "rows": 8, "test_source": "others"})
    found = load(both, TEXTS, 0, 0.0)
    assert (found.train.num_rows, found.test["text"].to_pylist()) == (8, [*"abcd"])
    with pytest.raises(DataError, match="need rows that are not trained on, got counted"):
        load(Data(source="counted", test_source="counted"), TEXTS, 0, 0.0)


def test_faults_in_options_are_listed_like_all_others():
    @data()
    def counted(rng, *, rows: int = 6):
        return rows_of(["a"] * rows, [0, 1] * (rows // 2))

    with pytest.raises(RecipeError) as raised:
        load_recipe("digits-vit", {"data.source": "counted", "data.rows": "x", "data.labls": [1]})
    assert "data.labls: unknown key" in str(raised.value)
    with pytest.raises(RecipeError, match=r"data.rows: expected .*integer"):
        load_recipe("digits-vit", {"data.source": "counted", "data.rows": "x"})
    # Without a method that has options, a key of another section is found as before.
    with pytest.raises(RecipeError, match=r"data.alpha: unknown key.*data.partition.alpha"):
        load_recipe("digits-vit", {"data.alpha": 1.0})
    with pytest.raises(PluginError, match="each option needs a type"):
        data("untyped")(_untyped)


def _untyped(rng, *, rows=3):
    del rng, rows


def test_options_go_with_the_method_that_another_source_replaces():
    chosen = with_images()(rows=20)
    recipe = load_recipe("digits-vit", plugins=[chosen])
    assert (recipe.data.source, recipe.data.options["rows"]) == ("images-of-a-test", 20)
    for other in ("digits", "rows.csv", ["a.csv", "b.csv"]):
        changed = recipe.with_({"data.source": other})
        assert changed.data == load_recipe("digits-vit", {"data.source": other}).data


def test_rows_may_be_any_table_or_a_pair_of_them():
    frame = rows_of("abcdef", ["x", "y"] * 3)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    for name, rows in {"table": table, "pair": (frame[:4], table[4:])}.items():
        data(f"{name}-of-a-test")(lambda rng, rows=rows: rows)
    found = load(Data(source="table-of-a-test", test_fraction=0.5), TEXTS, 0, 0.0)
    assert found.label_names == ("x", "y")
    found = load(Data(source="pair-of-a-test"), TEXTS, 0, 0.0)
    assert found.test["text"].to_pylist() == ["e", "f"]
    assert found.official_test


def test_a_list_of_rows_is_a_table_and_a_function_needs_no_generator():
    @data()
    def listed(*, count: int = 6):
        return [{"text": f"t{i}", "label": "xy"[i % 2]} for i in range(count)]

    @data()
    def split(*, count: int = 6):
        found = [{"text": f"t{i}", "label": i % 2} for i in range(count)]
        return found[2:], found[:2]

    chosen = Data.model_validate({"source": "listed", "count": 8, "test_fraction": 0.5})
    found = load(chosen, TEXTS, 0, 0.0)
    texts = {*found.train["text"].to_pylist(), *found.test["text"].to_pylist()}
    assert (texts, found.label_names) == ({f"t{i}" for i in range(8)}, ("x", "y"))
    found = load(Data(source="split"), TEXTS, 0, 0.0)
    assert found.test["text"].to_pylist() == ["t0", "t1"]
    # The same rows have the same hash, however they are handed over.
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    assert source_of(rows) == source_of(pd.DataFrame(rows)) != source_of(rows[::-1])


def test_a_plan_of_a_function_is_that_of_its_rows_in_memory():
    images = with_images()
    recipe = load_recipe(SMALL | {"name": "own"}, plugins=[images(rows=32)])
    by_name = rayfed_lora.plan(recipe)
    rows = images.__wrapped__(None, rows=32)
    in_memory = rayfed_lora.plan(load_recipe(SMALL | {"name": "own"}), data=rows)
    assert by_name.rounds == in_memory.rounds
    # 32 rows, a quarter of them for tests.
    assert by_name.outline.test_examples == 8
    assert int(by_name.outline.devices.sizes.sum()) == 24


def test_a_finished_run_is_exported_where_its_function_is_not_known(tmp_path, monkeypatch):
    (tmp_path / "rows_of_a_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    out, name = str(tmp_path / "run"), "rows_of_a_module"
    settings = {"data.source": f"{name}:rows_of_a_module", "data.rows": 24, "plugins": [name]}
    recipe = load_recipe(SMALL | {"name": "own"}, settings, plugins=[name])
    rayfed_lora.run(recipe, out, plugins=[name])
    stored = load_recipe(f"{out}/recipe.yaml").data
    assert stored.options["rows"] == 24
    DATA.remove("rows-of-a-module")
    # As in another process, where nobody has allowed the module.
    monkeypatch.setattr(registry, "_ALLOWED", set())
    assert kept_recipe(RunFolder(out), model_only=True).data.source == stored.source
    written = list(export_run(out, tmp_path / "to", merge=False))
    assert written and (tmp_path / "to" / "adapter_model.safetensors").exists()
    with pytest.raises(RunFolderError, match="rows_of_a_module"):
        kept_recipe(RunFolder(out))


MODULE = """
import numpy as np
from rayfed_lora.plugins import data

@data()
def rows_of_a_module(*, rows: int = 40):
    pixels = np.zeros((rows, 4, 4), np.uint8)
    return [{"image": image, "label": i % 2} for i, image in enumerate(pixels)]
"""


def test_rows_that_are_drawn_follow_the_seed_of_the_run():
    @data()
    def drawn(rng):
        return rows_of([str(n) for n in rng.integers(10**6, size=6)], [0, 1] * 3)

    def texts(seed):
        return load(Data(source="drawn", test_fraction=0.5), TEXTS, seed, 0.0).train["text"]

    assert texts(1).equals(texts(1))
    assert not set(texts(1).to_pylist()) & set(texts(2).to_pylist())


def test_what_a_function_raises_or_returns_is_named():
    @data()
    def broken(rng):
        raise KeyError("no such column")

    @data()
    def listed(rng):
        return [1, 2]

    @data(task=IMAGES)
    def pictures(rng):
        return rows_of("ab", [0, 1])

    for source, said in (
        ("broken", r"data 'broken' failed:[\s\S]*no such column"),
        ("listed", r"what data 'listed' returned: data: expected a pandas DataFrame.*got list"),
        ("pictures", r"data.source 'pictures': is for model.task image-classification, got text"),
    ):
        with pytest.raises(DataError, match=said):
            load(Data(source=source), TEXTS, 0, 0.0)


def test_a_module_that_is_not_allowed_is_not_imported_and_named(tmp_path, monkeypatch):
    (tmp_path / "stranger_rows.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=r"'stranger_rows:rows': need a name .*--plugins"):
        load(Data(source="stranger_rows:rows"), TEXTS, 0, 0.0)
    with pytest.raises(RecipeError, match=r"plugins: the recipe asks for code"):
        load_recipe("digits-vit", {"plugins": ["stranger_rows"]})


def test_a_folder_of_the_same_name_does_not_hide_it(tmp_path, monkeypatch):
    with_images()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images-of-a-test").mkdir()
    recipe = load_recipe("digits-vit", {"data.source": "images-of-a-test"})
    assert with_absolute_paths(recipe).data.source == "images-of-a-test"


def test_runs_in_one_thread_and_in_two_are_equal_and_resume_with_the_same_rows_only(
    tmp_path, monkeypatch
):
    images = with_images()
    recipe = load_recipe(SMALL | {"name": "own"}, plugins=[images(first=9)])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    runs = [
        rayfed_lora.run(recipe.with_({"runtime.client_actors": n}), str(tmp_path / str(n)))
        for n in (1, 2)
    ]
    assert len({run.summary["adapter_sha256"] for run in runs}) == 1
    (recorded,) = json.loads((tmp_path / "1" / "plugins.json").read_text())[0]["methods"]
    assert (recorded["kind"], recorded["name"]) == ("data", "images-of-a-test")
    stored = load_recipe(str(tmp_path / "1" / "recipe.yaml"))
    assert stored.data.options["first"] == 9
    # Stopped after the first round, and gone on with.
    out = str(tmp_path / "stopped")
    rayfed_lora.run(recipe, out, callbacks=[lambda done: True])
    with pytest.raises(RunFolderError, match=r"data.first"):
        rayfed_lora.run(recipe.with_({"data.first": 8}), out, resume=True)


def test_a_resume_is_rejected_where_the_function_returns_other_rows(tmp_path):
    kept = {"rows": 40}

    @data("changing-of-a-test")
    def changing(rng):
        pixels = np.full((kept["rows"], 4, 4), 7, np.uint8)
        return pd.DataFrame({"image": list(pixels), "label": np.arange(kept["rows"]) % 2})

    recipe = load_recipe(SMALL | {"name": "own"}, plugins=[changing]).with_(
        {"data.source": "changing-of-a-test"}
    )
    out = str(tmp_path / "run")
    _stop_after_a_round(recipe, out)
    kept["rows"] = 44
    with pytest.raises(RunFolderError, match="training examples"):
        rayfed_lora.run(recipe, out, resume=True)
    kept["rows"] = 40
    resumed = rayfed_lora.run(recipe, out, resume=True)
    whole = rayfed_lora.run(recipe, str(tmp_path / "whole"))
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def _stop_after_a_round(recipe, out):
    """Begin a run in a folder; end it, as a kill does, after the first round's checkpoint."""
    from rayfed_lora.launching.check_plugin import _rounds

    rounds = _rounds(recipe, RunFolder(out), resume=False)
    next(rounds)
    next(rounds)
    rounds.close()
