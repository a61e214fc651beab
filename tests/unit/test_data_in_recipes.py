"""Lists, patterns, folders and test sources in the recipe, its run, its job and its checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayfed_lora import plan
from rayfed_lora.data.dataset import Dataset, load
from rayfed_lora.data.workload import Workload
from rayfed_lora.errors import BadInputError, DataError, RecipeError
from rayfed_lora.jobs.local_files import files_named
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs.claiming import differences
from rayfed_lora.runs.location import with_absolute_paths
from rayfed_lora.training.preparing import prepare
from tests.fakes import RECIPE, make_recipe

VIT = {"architecture": "vit", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
VIT |= {"intermediate_size": 8, "patch_size": 2, "image_size": 4}
STRANGE = "s3://bucket/b.csv?endpoint_override=evil:9000"


def images(path: Path, first: int, rows: int = 12) -> str:
    """Write 4 x 4 images of one grey value, which is the number of the row."""
    lines = (
        f'{{"image": {[[i] * 4] * 4}, "label": {i % 2}}}\n' for i in range(first, first + rows)
    )
    path.write_text("".join(lines))
    return str(path)


def recipe(source: Any, **overrides: Any) -> Recipe:
    return make_recipe(data__source=source, model__config=VIT, **overrides)


def changed(before: Workload, now: Workload) -> list[str]:
    return [part for part, value in before.fingerprint.items() if now.fingerprint[part] != value]


def test_the_checksums_of_the_data_cover_every_file_of_every_source(tmp_path):
    paths = [images(tmp_path / f"{i}.jsonl", 12 * i) for i in range(3)]
    other = images(tmp_path / "other.json", 60, 4)
    given = recipe(str(tmp_path / "?.jsonl"), data__test_source=other)
    first = prepare(given)
    assert changed(first, prepare(given)) == []
    assert changed(first, prepare(recipe(paths, data__test_source=[other]))) == []
    images(Path(other), 70, 4)
    assert changed(first, prepare(given)) == ["test examples"]
    images(Path(other), 60, 4)
    images(Path(paths[1]), 100)
    assert changed(first, prepare(given)) == ["training examples"]
    images(Path(paths[1]), 12)
    images(tmp_path / "3.jsonl", 36)
    assert "training examples" in changed(first, prepare(given))
    (tmp_path / "3.jsonl").unlink()
    assert changed(first, prepare(given)) == []
    assert "training examples" in changed(first, prepare(recipe(paths[::-1])))


def test_plan_counts_the_examples_of_all_files_and_of_the_test_source(tmp_path):
    for i in range(2):
        images(tmp_path / f"{i}.jsonl", 12 * i)
    test = images(tmp_path / "test.json", 60, 4)
    found = plan(recipe(str(tmp_path / "?.jsonl"), data__test_source=test))
    assert not [note for note in found.notes if "data." in note]
    workload = prepare(recipe(str(tmp_path / "?.jsonl"), data__test_source=test))
    assert (len(workload.train), len(workload.test)) == (24, 4)
    noted = plan(recipe(str(tmp_path / "?.jsonl"), data__test_source=test, data__test_fraction=0.5))
    assert noted.notes == ("no effect with data.test_source: data.test_fraction",)
    with pytest.raises(DataError, match="none matches it"):
        plan(recipe(str(tmp_path / "*.csv")))


def test_a_resolved_recipe_keeps_lists_and_the_test_source():
    given = make_recipe(
        data__source=["a.csv", "b.csv"],
        data__test_source="t-*.csv.gz",
        data__format={"separator": ";", "encoding": "latin-1"},
    )
    assert load_recipe(parse_yaml("recipe", recipe_yaml(given))) == given
    assert unused(given) == ()
    assert load_recipe(RECIPE, ["data.source=[a.csv, b.csv]"]).data.source == ["a.csv", "b.csv"]
    assert differences(given, given) == []
    other = load_recipe(given, {"data.source": ["a.csv", "c.csv"], "data.test_source": None})
    assert differences(given, other) == ["data.source", "data.test_source"]


@pytest.mark.parametrize("value", [[], [1], {"a": "b"}, 3, ["a.csv", None], None])
def test_sources_that_are_no_text_and_no_list_of_texts_are_refused(value):
    with pytest.raises(RecipeError, match=r"data\.source"):
        make_recipe(data__source=value)


@pytest.mark.parametrize("key", ["source", "test_source"])
def test_each_location_of_a_list_is_guarded(key):
    given = load_recipe({**RECIPE, "data": {key: ["a.csv", STRANGE]}})
    found = getattr(given.data, key)
    assert found == ["a.csv", f"{STRANGE}&anonymous=true"]
    (note,) = unused(given)
    assert f"data.{key} names the object store https://evil:9000" in note
    own = load_recipe(RECIPE, {f"data.{key}": ["a.csv", STRANGE]})
    assert getattr(own.data, key) == ["a.csv", STRANGE]
    same = load_recipe(RECIPE, {f"data.{key}": ["a.csv", f"{STRANGE}&anonymous=true"]})
    assert differences(own, same) == []
    with pytest.raises(RecipeError, match=rf"data\.{key}: expected a URI without credentials"):
        load_recipe(RECIPE, {f"data.{key}": ["a.csv", "s3://KEY:SECRET@bucket/a.csv"]})


def test_local_files_folders_and_patterns_are_made_absolute_and_named_for_jobs(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "digits").mkdir()
    for name in ("a.csv", "rows/b.csv"):
        (tmp_path / name).touch()
    given = make_recipe(
        data__source=["a.csv", "rows", "rows/*.csv", "*.csv", "s3://b/c.csv"],
        data__test_source="rows",
    )
    absolute = with_absolute_paths(given).data
    local = [str(tmp_path / name) for name in ("a.csv", "rows", "rows/*.csv", "*.csv")]
    assert absolute.source == [*local, "s3://b/c.csv"]
    assert absolute.test_source == str(tmp_path / "rows")
    expected = [*(("data.source", path) for path in local), ("data.test_source", local[1])]
    assert files_named(given) == expected
    # A folder does not hide a built-in name, nor an id of the hub a file.
    for source in ("digits", "hf:rows"):
        assert with_absolute_paths(make_recipe(data__source=source)).data.source == source
    for source in ("gone/*.csv", "./gone", ["a.csv", "gone.csv"]):
        with pytest.raises(BadInputError, match=r"data\.test_source: '.*gone.*' is not here"):
            files_named(make_recipe(data__test_source=source))


def test_patterns_folders_and_lists_are_read_from_an_object_store(bucket):
    for i in range(3):
        rows = "".join(f"text {j},{'ab'[j % 2]}\n" for j in range(4 * i, 4 * i + 4))
        with bucket.filesystem.open_output_stream(f"{bucket.name}/some rows/p{i}.csv") as out:
            out.write(f"text,label\n{rows}".encode())

    def read(source: Any, test: str | None = "some%20rows/p2.csv") -> Dataset:
        place = [*map(bucket.uri, source)] if isinstance(source, list) else bucket.uri(source)
        data = Data(source=place, test_source=test and bucket.uri(test))
        return load(data, "text-classification", 0, 0.0)

    listed = read([f"some%20rows/p{i}.csv" for i in range(2)])
    assert (listed.train.num_rows, listed.test.num_rows) == (8, 4)
    for source in ("some%20rows/p[01].csv", "*/p[01].csv"):
        assert read(source).train.equals(listed.train)
    whole = read("some%20rows", None)
    assert whole.train.num_rows + whole.test.num_rows == 12
    for source, message in (
        ("some%20rows", "not trained on"),
        ("gone", "no such"),
        ("some%20rows/q*.csv", "none matches"),
        ("a.csv", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            read(source)
