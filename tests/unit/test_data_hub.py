"""Sources `hf:<id>`, with a fake `datasets` package."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pytest

from rayfed_lora.data.dataset import load
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data, Partition

TASK = "text-classification"
TEXTS = [f"text {i}" for i in range(20)]


@dataclass
class FakeSplit:
    """As much of `datasets.Dataset` as is used: columns in Arrow form, and features."""

    table: pa.Table
    features: dict = field(default_factory=dict)

    def with_format(self, kind: str) -> FakeSplit:
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        return self.table[rows]


@pytest.fixture
def hub(monkeypatch):
    """A fake `datasets` whose data sets are what the test puts into the returned dict."""
    ids: dict[str, dict[str, FakeSplit]] = {}

    def load_dataset(name: str, configuration: str = "default") -> dict[str, FakeSplit]:
        name = name if configuration == "default" else f"{name} {configuration}"
        if name == "org/several":
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"
            )
        if name not in ids:
            raise RuntimeError(f"Dataset '{name}' doesn't exist on the Hub\nmore lines")
        return ids[name]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return ids


def split(labels, texts=TEXTS, **columns):
    names = SimpleNamespace(names=["bad", "good"])
    return FakeSplit(pa.table({"text": texts, "label": labels, **columns}), {"label": names})


def test_the_hubs_own_splits_and_class_names_are_used(hub):
    hub["org/set"] = {"train": split([0, 1] * 10), "test": split([1, 0], ["x", "y"])}
    dataset = load(Data(source="hf:org/set"), TASK, 0, 0.0)
    assert dataset.train.num_rows == 20
    assert dataset.test.to_pylist() == [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    assert dataset.label_names == ("bad", "good")


def test_class_names_choose_labels_too(hub):
    hub["org/set"] = {"train": split([0, 1] * 10)}
    dataset = load(Data(source="hf:org/set", labels=["good", "bad"]), TASK, 0, 0.0)
    assert dataset.label_names == ("good", "bad")


def test_without_class_names_the_labels_name_themselves(hub):
    hub["org/set"] = {"train": FakeSplit(pa.table({"text": TEXTS, "label": [3, 4] * 10}))}
    assert load(Data(source="hf:org/set"), TASK, 0, 0.0).label_names == ("3", "4")


def test_without_a_test_split_one_is_cut_off(hub):
    hub["org/set"] = {"train": split([0, 1] * 10), "validation": split([0, 1] * 10)}
    dataset = load(Data(source="hf:org/set"), TASK, 0, 0.0)
    assert (dataset.train.num_rows, dataset.test.num_rows) == (16, 4)


def test_a_test_split_with_hidden_labels_counts_as_absent(hub):
    hub["org/set"] = {"train": split([0, 1] * 10), "test": split([-1] * 20)}
    assert load(Data(source="hf:org/set"), TASK, 0, 0.0).test.num_rows == 4


def test_an_official_test_split_needs_no_client_column(hub):
    hub["org/set"] = {"train": split([0, 1] * 10, who=["a", "b"] * 10), "test": split([0] * 20)}
    data = Data(source="hf:org/set", partition=Partition(kind="column", column="who"))
    dataset = load(data, TASK, 0, 0.0)
    assert "client" in dataset.train.column_names
    assert "client" not in dataset.test.column_names


def test_a_label_that_only_the_test_split_has_is_an_error_that_names_it(hub):
    hub["org/set"] = {"train": split([0, 1] * 10), "test": split([0, 2] * 10)}
    with pytest.raises(DataError, match=r"test split: .*\(0, 1\), got 2; list .* `data.labels`"):
        load(Data(source="hf:org/set"), TASK, 0, 0.0)


def test_test_labels_of_another_type_are_an_error(hub):
    hub["org/set"] = {"train": split([0, 1] * 10), "test": split(["bad", "good"] * 10)}
    with pytest.raises(DataError, match="got bad, good"):
        load(Data(source="hf:org/set"), TASK, 0, 0.0)


def test_a_test_split_without_a_chosen_label_is_an_error(hub):
    hub["org/set"] = {"train": split([0, 1, 2, 0] * 5), "test": split([2] * 20)}
    with pytest.raises(DataError, match=r"need rows with data\.labels, got none"):
        load(Data(source="hf:org/set", labels=[0, 1]), TASK, 0, 0.0)


def test_test_images_of_another_shape_are_an_error(hub):
    def images(height, labels):
        column = [[[0] * 8] * height] * len(labels)
        return FakeSplit(pa.table({"image": column, "label": labels}))

    hub["org/set"] = {"train": images(8, [0, 1]), "test": images(7, [0, 1])}
    with pytest.raises(DataError, match=r"\[1, 8, 8\], got \[1, 7, 8\]"):
        load(Data(source="hf:org/set"), "image-classification", 0, 0.0)


def test_no_train_split_is_an_error_that_lists_the_splits(hub):
    hub["org/set"] = {"test": split([0, 1] * 10), "extra": split([0, 1] * 10)}
    with pytest.raises(DataError, match="need a split `train`, got extra, test"):
        load(Data(source="hf:org/set"), TASK, 0, 0.0)


def test_an_unknown_id_is_an_error_with_the_hubs_first_line(hub):
    with pytest.raises(DataError, match=r"'hf:org/none'.*RuntimeError: .*on the Hub$"):
        load(Data(source="hf:org/none"), TASK, 0, 0.0)


def test_without_the_package_it_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'rayfed-lora\[hub\]'"):
        load(Data(source="hf:org/set"), TASK, 0, 0.0)


def test_an_id_with_a_configuration_and_a_split_is_read(hub):
    hub["org/set two"] = {"train": split([0, 1] * 10), "test": split([1, 0], ["x", "y"])}
    hub["org/set"] = {"train": split([0, 1] * 5, TEXTS[:10]), "dev": split([0, 1], ["v", "w"])}
    found = load(Data(source="hf:org/set:two"), TASK, 0, 0.0)
    assert (found.train.num_rows, found.test.num_rows) == (20, 2)
    for source in ("hf:org/set:two:test", "hf:org/set::dev"):
        found = load(Data(source="hf:org/set::train", test_source=source), TASK, 0, 0.0)
        texts = {"hf:org/set::dev": ["v", "w"]}.get(source, ["x", "y"])
        assert found.test["text"].to_pylist() == texts
        assert found.train.num_rows == 10
    found = load(Data(source="hf:org/set", test_source="hf:org/set:two"), TASK, 0, 0.0)
    assert found.test["text"].to_pylist() == ["x", "y"]


@pytest.mark.parametrize(
    ("source", "test", "message"),
    [
        (
            "hf:org/several",
            None,
            r"configurations \['a', 'b'\], as in hf:org/several:CONFIGURATION",
        ),
        (
            "hf:org/set::none",
            None,
            "split `none`, got dev, train; name one as in hf:org/set::SPLIT",
        ),
        ("hf:org/set", "hf:org/set", "data.test_source .* split `test`, got dev, train"),
        ("hf:org/set", "hf:org/set::train", "not trained on, got hf:org/set::train"),
        ("hf:org/set:a:b:c", None, "need hf:ID, hf:ID:CONFIGURATION or hf:ID:CONFIGURATION:SPLIT"),
        ("hf:", None, "need hf:ID"),
    ],
)
def test_a_part_of_a_data_set_that_is_not_there_is_an_error(hub, source, test, message):
    hub["org/set"] = {"train": split([0, 1] * 10), "dev": split([0, 1], ["v", "w"])}
    with pytest.raises(DataError, match=message):
        load(Data(source=source, test_source=test), TASK, 0, 0.0)
