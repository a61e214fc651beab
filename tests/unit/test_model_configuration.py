"""Values of `model.config` that no model would take are refused before a model is built."""

import pytest

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.recipe.model import Model


def test_a_misspelt_configuration_key_is_refused_with_the_nearest():
    model = Model(config={"architecture": "vit", "hiden_size": 32})
    with pytest.raises(ModelError, match=r"hiden_size: .*ViTConfig \(did you mean 'hidden_size'"):
        base_models.configuration(model, {})


def test_the_keys_of_a_configuration_are_taken():
    model = Model(config={"architecture": "vit", "hidden_size": 24, "num_hidden_layers": 1})
    config = base_models.configuration(model, {"num_labels": 3})
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (24, 1, 3)
