"""Rows that the caller of a run has in memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import rayfed_lora
from rayfed_lora.data import memory
from rayfed_lora.data.dataset import load
from rayfed_lora.data.memory import source_of
from rayfed_lora.engines.factory import WithTables
from rayfed_lora.errors import BadInputError, DataError, RunFolderError
from rayfed_lora.jobs.jobs import Jobs
from rayfed_lora.recipe.data import Data
from tests.fake_jobs import FakeClient
from tests.fakes import FakeFactory, make_recipe

ROWS = pd.DataFrame(
    {
        "text": [f"word {i}" for i in range(20)],
        "label": ["yes", "no"] * 10,
        "who": ["a", "b", "c", "d"] * 5,
    }
)
COLUMNS = {"partition": {"kind": "column", "column": "who"}, "test_fraction": 0.2}


def loaded(source: str) -> object:
    data = Data.model_validate({"source": source, **COLUMNS})
    return load(data, "text-classification", 0, 0.0)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_HELD", {})


def test_a_frame_gives_what_a_file_of_it_gives(tmp_path):
    ROWS.to_parquet(tmp_path / "rows.parquet")
    here, there = loaded(source_of(ROWS)), loaded(str(tmp_path / "rows.parquet"))
    assert here.train.equals(there.train)
    assert here.test.equals(there.test)
    assert (here.label_names, here.clients) == (there.label_names, there.clients)


def test_the_same_rows_have_the_same_name_however_they_are_held():
    table = pa.Table.from_pandas(ROWS, preserve_index=False)
    name = source_of(ROWS)
    assert name.startswith("memory:")
    chunks = pa.concat_tables([table[:7], table[7:]])
    categories = ROWS.astype({"label": "category"})
    shuffled = ROWS.sample(frac=1.0, random_state=0)
    others = [ROWS[:19], shuffled, (ROWS[:10], ROWS[10:]), ROWS.rename(columns={"who": "whom"})]
    assert {source_of(same) for same in (table, chunks, categories, ROWS.copy())} == {name}
    assert len({name, *map(source_of, others)}) == 5


def test_a_pair_has_its_own_test_rows():
    found = loaded(source_of((ROWS[:16], ROWS[16:])))
    assert (found.train.num_rows, found.test.num_rows, found.official_test) == (16, 4, True)


def test_names_of_classes_come_from_a_hub_data_set():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["no", "yes"]),
        who=datasets.Value("string"),
    )
    rows = {**ROWS.to_dict("list"), "label": [1, 0] * 10}
    made = datasets.Dataset.from_dict(rows, features=features)
    assert loaded(source_of(made)).label_names == ("no", "yes")
    assert source_of(datasets.DatasetDict(train=made)) == source_of(made)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (ROWS.to_dict("list"), "expected the splits train"),
        ([1, 2], "expected a pandas DataFrame, a datasets.Dataset"),
        (ROWS[:0], "expected rows, got none"),
        (pd.DataFrame({"text": [object(), object()]}), "expected columns of texts, numbers"),
        ((ROWS, ROWS, ROWS), "got tuple"),
    ],
)
def test_what_has_no_rows_is_refused(data, said):
    with pytest.raises(DataError, match=said):
        source_of(data)


def test_images_of_a_frame_are_arrays():
    pixels = [np.full((4, 4), i, np.uint8) for i in range(8)]
    frame = pd.DataFrame({"image": pixels, "label": [0, 1] * 4})
    data = Data.model_validate({"source": source_of(frame), "test_fraction": 0.5})
    found = load(data, "image-classification", 0, 0.0)
    assert found.train["image"].type.shape == [1, 4, 4]


def test_a_run_goes_on_with_the_same_rows_only(tmp_path, forgotten):
    out = str(tmp_path / "run")
    recipe = make_recipe(annealing__holding__rounds=1)
    first = rayfed_lora.run(
        recipe, out, data=ROWS, factory=FakeFactory(), callbacks=[lambda done: True]
    )
    assert first.summary["stopped_by"]
    stored = rayfed_lora.load_recipe(f"{out}/recipe.yaml")
    assert stored.data.source == source_of(ROWS)
    with pytest.raises(RunFolderError, match=r"data.source"):
        rayfed_lora.run(recipe, out, resume=True, data=ROWS[:19], factory=FakeFactory())
    memory._HELD.clear()
    rayfed_lora.report([out])
    with pytest.raises(DataError, match="hand them over again"):
        rayfed_lora.run(f"{out}/recipe.yaml", str(tmp_path / "b"), factory=FakeFactory())
    assert not (tmp_path / "b").exists()
    with pytest.raises(DataError, match="hand them over again"):
        rayfed_lora.plan(f"{out}/recipe.yaml")


def test_rows_travel_to_other_processes_but_not_with_jobs(forgotten):
    source = source_of(ROWS)
    held = memory.held_for([source])
    recipe = make_recipe(data__source=source)
    memory._HELD.clear()
    WithTables(FakeFactory(), lambda: held).workload(recipe)
    assert memory.read_memory(source, ("label",)).train.num_rows == 20
    with pytest.raises(BadInputError, match="rows in memory do not travel with a job"):
        Jobs(client=FakeClient()).submit(recipe, "/shared/a")
