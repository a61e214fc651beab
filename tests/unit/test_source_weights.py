"""Weights of a source that do not fit are rejected by name; what is drawn anew is reported."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from rayfed_lora.errors import ModelError
from rayfed_lora.models.sources import quiet
from rayfed_lora.recipe import Recipe
from rayfed_lora.training.trainer import LocalTrainer, built_weights
from rayfed_lora.training.workload import outline, prepare
from rayfed_lora.types import AdapterState, Base
from tests.fakes import make_recipe

CLASSES = 3
Tensors = dict[str, torch.Tensor]


def vit(**own: Any) -> ViTForImageClassification:
    """One layer of width 16 on 1 x 8 x 8 images, as digits are."""
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": CLASSES,
    }
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(**values | own))


def bert_config(**own: Any) -> BertConfig:
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 40,
        "max_position_embeddings": 16,
    }
    return BertConfig(**values | own)


def saved(net: nn.Module, folder: Path) -> Path:
    with quiet():
        net.save_pretrained(folder)  # type: ignore[operator]
    return folder


def changed(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def on_digits(folder: Path, **overrides: Any) -> Recipe:
    """Return a recipe on the first three digits; nothing of it is trained in a full round."""
    values = {
        "model__source": str(folder),
        "model__config": {},
        "data__labels": [0, 1, 2],
        "data__max_examples": 60,
        "annealing__initiating__rounds": 0,
    }
    return make_recipe(**values | overrides)


def on_texts(folder: Path, words: Path, **overrides: Any) -> Recipe:
    values = {
        "model__task": "text-classification",
        "model__source": str(folder),
        "model__tokenizer": str(words / "tokenizer"),
        "model__config": {},
        "data__source": str(words / "texts.jsonl"),
        "data__max_length": 8,
        "annealing__initiating__rounds": 0,
    }
    return make_recipe(**values | overrides)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty labelled texts and a tokenizer of 14 words for them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    names = ["dog", "cat", "moon", "far", "old", "the", "is", "who", "how", "many", "where"]
    draw = np.random.default_rng(0)
    rows = [
        {"text": " ".join(draw.choice(names, int(draw.integers(1, 8)))), "label": f"c{i % 3}"}
        for i in range(60)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>"
    )
    fast.save_pretrained(str(folder / "tokenizer"))
    return folder


def both_refuse(recipe: Recipe, message: str) -> None:
    """See that `plan` and `run` refuse alike."""
    for reads in (outline, prepare):
        with pytest.raises(ModelError, match=message):
            reads(recipe)


def test_a_source_that_fits_has_nothing_to_report(tmp_path: Path) -> None:
    names = {i: str(i) for i in range(CLASSES)}
    recipe = on_digits(saved(vit(id2label=names), tmp_path))
    assert outline(recipe).notes == ()
    assert prepare(recipe).notes == ()


def test_tensors_under_other_names_are_refused_by_the_names_that_are_missing(
    tmp_path: Path,
) -> None:
    folder = changed(
        saved(vit(), tmp_path), lambda t: {f"module.{name}": value for name, value in t.items()}
    )
    # 2 embeddings, the patches' weight and bias, 16 of the layer, 2 of the last norm.
    both_refuse(
        on_digits(folder),
        r"expected the weights of a ViTForImageClassification, 22 tensors are missing:"
        r" vit\.embeddings\.cls_token, .* and 18 more; not used are"
        r" module\.classifier \(2\), module\.vit \(22\)",
    )


def test_the_weights_of_another_architecture_are_refused(tmp_path: Path, words: Path) -> None:
    config = DistilBertConfig(
        dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=40, max_position_embeddings=16
    )
    folder = saved(DistilBertForSequenceClassification(config), tmp_path)
    bert_config().save_pretrained(folder)
    both_refuse(
        on_texts(folder, words),
        r"weights of a BertForSequenceClassification, \d+ tensors are missing: bert\.embeddings",
    )


def test_one_missing_tensor_of_the_encoder_is_refused(tmp_path: Path) -> None:
    # In the file it has its older name.
    folder = changed(
        saved(vit(), tmp_path), lambda t: {n: v for n, v in t.items() if "key.weight" not in n}
    )
    told = r"1 tensor is missing: vit\.layers\.0\.attention\.k_proj\.weight;"
    both_refuse(on_digits(folder), told)


def test_missing_running_statistics_are_refused(tmp_path: Path) -> None:
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1])
    config.num_labels = CLASSES
    folder = changed(
        saved(ResNetForImageClassification(config), tmp_path),
        lambda t: {n: v for n, v in t.items() if "running_var" not in n},
    )
    recipe = on_digits(folder, annealing__mode="full", adapter__target_modules=["any"])
    with pytest.raises(ModelError, match=r"missing: resnet\..*running_var"):
        prepare(recipe)


def test_counters_of_normalisation_may_be_missing(tmp_path: Path) -> None:
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1])
    config.num_labels = CLASSES
    folder = changed(
        saved(ResNetForImageClassification(config), tmp_path),
        lambda t: {n: v for n, v in t.items() if "num_batches_tracked" not in n},
    )
    assert not any("drawn" in note for note in prepare(on_digits(folder)).notes)


def test_a_head_of_another_size_is_drawn_anew_and_reported(tmp_path: Path) -> None:
    source = vit(num_labels=7)
    recipe = on_digits(saved(source, tmp_path))
    told = r"classifier \(2\) of another size \(classifier\.bias: \(7,\), here \(3,\)\): drawn"
    for notes in (outline(recipe).notes, prepare(recipe).notes):
        assert len([note for note in notes if re.search(told, note)]) == 1
    weights = built_weights(recipe, prepare(recipe))
    assert weights["classifier.weight"].shape == (3, 16)
    assert 0 < np.abs(weights["classifier.weight"]).max() < 0.2
    kept = "vit.layers.0.mlp.fc1.weight"
    np.testing.assert_array_equal(weights[kept], source.get_parameter(kept).detach())


def test_another_size_outside_of_the_head_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(vit(), tmp_path)
    both_refuse(
        on_digits(folder, model__config={"intermediate_size": 32}),
        r"3 tensors are of another size: vit\.layers\.0\.mlp\.fc1\.bias \(\(24,\), expected \(32,",
    )


def test_a_masked_language_model_gets_a_new_pooler_and_head_and_a_report(
    tmp_path: Path, words: Path
) -> None:
    folder = saved(BertForMaskedLM(bert_config()), tmp_path)
    notes = outline(on_texts(folder, words)).notes
    assert any("no weights for bert.pooler (2), classifier (2): drawn" in note for note in notes)
    assert any(note.startswith("bert.pooler (2): random weights that no client") for note in notes)
    assert any(note.endswith("not used: cls.predictions (5)") for note in notes)
    trained = on_texts(folder, words, adapter__head_modules=["bert.pooler", "classifier"])
    assert not any("that no client trains" in note for note in outline(trained).notes)


def test_a_part_of_the_encoder_that_a_recipe_calls_its_head_is_reported_if_it_is_new(
    tmp_path: Path,
) -> None:
    folder = changed(
        saved(vit(), tmp_path),
        lambda t: {n: v for n, v in t.items() if not n.startswith("vit.layernorm.")},
    )
    both_refuse(on_digits(folder), r"2 tensors are missing: vit\.layernorm\.bias")
    named = on_digits(folder, adapter__head_modules=["vit.layernorm", "classifier"])
    assert any("no weights for vit.layernorm (2)" in note for note in outline(named).notes)


def test_layers_that_a_recipe_leaves_out_are_reported(tmp_path: Path) -> None:
    folder = saved(vit(num_hidden_layers=2), tmp_path)
    notes = outline(on_digits(folder, model__config={"num_hidden_layers": 1})).notes
    assert any("not used: vit.layers (16)" in note for note in notes)


def test_a_language_model_without_its_output_layer_is_refused_unless_it_is_tied(
    tmp_path: Path, words: Path
) -> None:
    values = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    own = {"model__task": "causal-lm", "adapter__train_head": False}
    bare = saved(LlamaModel(LlamaConfig(**values)), tmp_path / "bare")
    both_refuse(on_texts(bare, words, **own), r"1 tensor is missing: lm_head\.weight")
    tied = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=True))
    assert outline(on_texts(saved(tied, tmp_path / "tied"), words, **own)).notes == ()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = saved(vit(), tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-64])
    both_refuse(on_digits(folder), "file not fully covered")


def test_weights_that_are_not_numbers_are_refused_by_name(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["vit.layernorm.weight"][3] = float("nan")
        return tensors

    recipe = on_digits(changed(saved(vit(), tmp_path), spoil))
    with pytest.raises(ModelError, match=r"NaN or infinity in vit\.layernorm\.weight"):
        built_weights(recipe, prepare(recipe))


def test_pickled_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = saved(vit(), tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    both_refuse(on_digits(folder), r"\*\.safetensors, found pytorch_model\.bin; .*save_pretrained")


def test_an_adapter_is_refused_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    both_refuse(on_digits(tmp_path), "the folder holds a PEFT adapter")


def test_a_shard_that_is_missing_is_refused(tmp_path: Path) -> None:
    net = vit()
    with quiet():
        net.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    recipe = on_digits(tmp_path)
    assert not any("no weights" in note for note in outline(recipe).notes)
    shards[0].unlink()
    both_refuse(recipe, re.escape(shards[0].name))


def accuracy(recipe: Recipe) -> float:
    """Return how often an untrained trainer is right on the test split."""
    workload = prepare(recipe)
    trainer = LocalTrainer(recipe, workload)
    state = AdapterState({}, trainer.initial_tensors("adapter"))
    rows = slice(0, len(workload.test))
    found = trainer.evaluate("test", rows, state, Base(), "adapter")
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
    plain = prepare(make_recipe(data__labels=[0, 1, 2], data__max_examples=60))
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
    weights = built_weights(recipe, workload)
    assert np.abs(weights["classifier.weight"] - source["classifier.weight"].numpy()).max() > 0.01
    np.testing.assert_array_equal(weights["classifier.bias"], 0)
    kept = "vit.layernorm.weight"
    assert source[kept].std() > 0
    np.testing.assert_array_equal(weights[kept], source[kept])
    # The same seed gives the same head.
    again = built_weights(recipe, workload)
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
    weights = built_weights(recipe, prepare(recipe))
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


def test_names_are_compared_without_case_where_they_differ_by_it(
    tmp_path: Path, words: Path
) -> None:
    net = BertForSequenceClassification(
        bert_config(id2label={0: "C2", 1: "C0", 2: "C1"}, num_labels=3)
    )
    recipe = on_texts(saved(net, tmp_path), words)
    assert prepare(recipe).label_names == ("c2", "c0", "c1")
    assert not any("drawn" in note for note in outline(recipe).notes)


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
