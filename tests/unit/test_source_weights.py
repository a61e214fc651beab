"""Weights of a source that do not fit are rejected by name; what is drawn anew is reported."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from rayfed_lora.errors import ModelError
from rayfed_lora.models.quiet import quiet
from rayfed_lora.training.preparing import outline, prepare
from rayfed_lora.training.weights import built_weights
from tests.small_sources import (
    CLASSES,
    Tensors,
    bert_config,
    both_refuse,
    changed,
    on_digits,
    on_texts,
    saved,
    vit,
    write_words,
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled texts and a tokenizer for them."""
    return write_words(tmp_path_factory.mktemp("words"))


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
        r" vit\.embeddings\.cls_token, .* and 18 more; unused are"
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
    assert not any("initialised" in note for note in prepare(on_digits(folder)).notes)


def test_a_head_of_another_size_is_drawn_anew_and_reported(tmp_path: Path) -> None:
    source = vit(num_labels=7)
    recipe = on_digits(saved(source, tmp_path))
    told = r"classifier \(2\) of another size \(classifier\.bias: \(7,\), here \(3,\)\): init"
    for notes in (outline(recipe).notes, prepare(recipe).notes):
        assert len([note for note in notes if re.search(told, note)]) == 1
    weights = built_weights(recipe, prepare(recipe)).arrays
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
    assert any(
        "no weights for bert.pooler (2), classifier (2): initialised at random" in note
        for note in notes
    )
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
