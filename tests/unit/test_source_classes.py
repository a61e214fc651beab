"""Classes are numbered as the head of the source has them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertForSequenceClassification,
)

from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.messages import Export
from rayfed_lora.training.preparing import outline, prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.training.weights import built_weights
from rayfed_lora.types import AdapterState, Base, GlobalModel
from tests.fakes import make_recipe
from tests.small_sources import (
    bert_config,
    both_refuse,
    on_digits,
    on_texts,
    saved,
    vit,
    write_words,
)
from tests.tasks import initial_tensors, predict


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled texts and a tokenizer for them."""
    return write_words(tmp_path_factory.mktemp("words"))


def accuracy(recipe: Recipe) -> float:
    """Return how often an untrained trainer is right on the test split."""
    workload = prepare(recipe)
    trainer = LocalTrainer(recipe, workload)
    state = AdapterState({}, initial_tensors(trainer, "adapter"))
    rows = slice(0, len(workload.test))
    found = predict(trainer, rows, state)
    return float(found.correct.mean())


@pytest.fixture(scope="module")
def digit_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model trained on three digits, its classes called two, zero and one in that order."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    own = pixels[labels < 3].reshape(-1, 1, 8, 8) / 8 - 1
    # Class 0 of the model is the digit 2, and so on.
    classes = torch.tensor((labels[labels < 3] + 1) % 3)
    net = vit(id2label={0: "2", 1: "0", 2: "1"})
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    inputs = torch.tensor(own, dtype=torch.float32)
    for _ in range(40):
        optimizer.zero_grad()
        net(pixel_values=inputs, labels=classes).loss.backward()
        optimizer.step()
    return saved(net, tmp_path_factory.mktemp("reader"))


def test_classes_are_numbered_as_in_the_trained_head(digit_reader: Path) -> None:
    recipe = on_digits(digit_reader)
    workload = prepare(recipe)
    assert workload.label_names == outline(recipe).label_names == ("2", "0", "1")
    assert workload.config["id2label"] == {0: "2", 1: "0", 2: "1"}
    assert any("numbered as in the head" in note for note in workload.notes)
    assert accuracy(recipe) > 0.95


def test_every_split_and_client_has_the_examples_of_its_classes(digit_reader: Path) -> None:
    plain = prepare(on_digits_of_the_data())
    ordered = prepare(on_digits(digit_reader))
    for split in ("train", "test"):
        before, after = getattr(plain, split), getattr(ordered, split)
        np.testing.assert_array_equal(before.inputs["pixel_values"], after.inputs["pixel_values"])
        assert [plain.label_names[i] for i in before.labels] == [
            ordered.label_names[i] for i in after.labels
        ]


def test_a_head_for_other_classes_is_drawn_anew_and_reported(
    digit_reader: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "named"
    shutil.copytree(digit_reader, folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "cat", "1": "dog", "2": "bird"}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = on_digits(folder, data__labels=[3, 4, 5])
    told = r"its head is for other classes \(cat, dog, bird\) than the data's \(3, 4, 5\)"
    assert any(re.search(told, note) for note in outline(recipe).notes)
    source = load_file(folder / "model.safetensors")
    workload = prepare(recipe)
    weights = built_weights(recipe, workload).arrays
    assert np.abs(weights["classifier.weight"] - source["classifier.weight"].numpy()).max() > 0.01
    np.testing.assert_array_equal(weights["classifier.bias"], 0)
    kept = "vit.layernorm.weight"
    assert source[kept].std() > 0
    np.testing.assert_array_equal(weights[kept], source[kept])
    # The same seed gives the same head.
    again = built_weights(recipe, workload).arrays
    np.testing.assert_array_equal(weights["classifier.weight"], again["classifier.weight"])


def test_numbers_of_the_data_are_taken_for_the_classes_of_the_head(
    digit_reader: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "named"
    shutil.copytree(digit_reader, folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "two", "1": "zero", "2": "one"}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = on_digits(folder)
    notes = outline(recipe).notes
    assert any(
        "classes 0, 1, 2 are taken for those of its head, two, zero, one" in n for n in notes
    )
    weights = built_weights(recipe, prepare(recipe)).arrays
    source = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(weights["classifier.weight"], source["classifier.weight"])


def test_names_in_the_recipe_say_which_class_is_which(digit_reader: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unnamed"
    shutil.copytree(digit_reader, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (folder / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    unnamed = on_digits(folder)
    assert any("does not name its classes" in note for note in outline(unnamed).notes)
    assert accuracy(unnamed) < 0.1
    named = on_digits(folder, model__config={"id2label": {0: "2", 1: "0", 2: "1"}})
    assert accuracy(named) > 0.95


ORDERED = {0: "2", 1: "0", 2: "1"}
SMALL = {
    "architecture": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
}


def test_names_in_the_recipe_number_the_classes_of_a_random_model_too() -> None:
    own = {**SMALL, "id2label": ORDERED}
    recipe = make_recipe(
        model__config=own,
        data__labels=[0, 1, 2],
        data__max_examples=60,
        annealing__initiating__rounds=0,
    )
    workload = prepare(recipe)
    assert workload.label_names == outline(recipe).label_names == ("2", "0", "1")
    assert workload.config["id2label"] == ORDERED
    # The digits themselves are those of the data's own order.
    plain = prepare(on_digits_of_the_data())
    assert [("2", "0", "1")[i] for i in workload.test.labels] == [
        plain.label_names[i] for i in plain.test.labels
    ]
    trainer = LocalTrainer(recipe, workload)
    state = AdapterState({}, initial_tensors(trainer, "adapter"))
    files = trainer.run(Export(GlobalModel(state, Base(), "adapter")))
    said = json.loads(files["base/config.json"])
    assert said["id2label"] == {str(i): name for i, name in ORDERED.items()}
    assert said["label2id"] == {name: i for i, name in ORDERED.items()}


def test_default_names_in_the_recipe_say_nothing_of_the_classes() -> None:
    own = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config = {**SMALL, "id2label": own}
    recipe = make_recipe(model__config=config, data__labels=[3, 4, 5])
    assert prepare(recipe).label_names == outline(recipe).label_names == ("3", "4", "5")


def on_digits_of_the_data() -> Recipe:
    return make_recipe(data__labels=[0, 1, 2], data__max_examples=60, model__config=SMALL)


@pytest.mark.parametrize(
    "names", [["x", "y", "z"], ["2", "0", "3"], ["2", "0"], ["LABEL_0", "a", "b"]]
)
def test_names_in_the_recipe_that_are_not_the_datas_are_refused(
    names: list[str], digit_reader: Path
) -> None:
    own = {"id2label": dict(enumerate(names))}
    told = rf"id2label: expected the data's classes, 3, 4, 5, got {', '.join(names)}"
    both_refuse(on_digits(digit_reader, model__config=own, data__labels=[3, 4, 5]), told)
    random = {**SMALL, **own}
    both_refuse(make_recipe(model__config=random, data__labels=[3, 4, 5]), told)


def test_names_are_compared_without_case_where_they_differ_by_it(
    tmp_path: Path, words: Path
) -> None:
    net = BertForSequenceClassification(
        bert_config(id2label={0: "C2", 1: "C0", 2: "C1"}, num_labels=3)
    )
    recipe = on_texts(saved(net, tmp_path), words)
    assert prepare(recipe).label_names == ("c2", "c0", "c1")
    assert not any("initialised" in note for note in outline(recipe).notes)


@pytest.mark.parametrize("names", [["a", "b", "c"], {"0": "a", "2": "b", "3": "c"}])
def test_names_of_classes_that_are_not_numbered_are_refused(names: Any, digit_reader: Path) -> None:
    both_refuse(on_digits(digit_reader, model__config={"id2label": names}), "id2label: expected")


def test_a_tokenizer_that_is_no_tokenizer_is_refused(tmp_path: Path, words: Path) -> None:
    net = BertForSequenceClassification(bert_config(num_labels=3))
    recipe = on_texts(saved(net, tmp_path / "m"), words)
    shutil.copytree(words / "tokenizer", tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text('{"version": "1.0"}')
    both_refuse(
        on_texts(tmp_path / "m", words, model__tokenizer=str(tmp_path / "t")), "tokenizer of"
    )
    assert outline(recipe).label_names == ("c0", "c1", "c2")
