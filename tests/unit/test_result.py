"""A run from Python: the recipe as a value, the result as an object."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rayfed_lora
from rayfed_lora import Recipe, Result
from rayfed_lora.errors import BadInputError, RecipeError, RunFolderError

SMALL = {
    "data.partition.clients": 6,
    "data.max_examples": 120,
    "clients.per_round": 3,
    "clients.local_steps": 1,
    "annealing.initiating.rounds": 1,
    "annealing.heating.rounds": 1,
    "annealing.cooling.rounds": 0,
    "annealing.holding.rounds": 0,
    "annealing.heating.rank": 4,
    "runtime.executor": "local",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    recipe = Recipe.load("digits-vit").with_(SMALL)
    return rayfed_lora.run(recipe, str(tmp_path_factory.mktemp("runs") / "a"))


def test_a_recipe_is_loaded_changed_and_always_validated():
    recipe = Recipe.load("digits-vit")
    changed = recipe.with_({"annealing.cooling.rank": 2})
    assert (recipe.annealing.cooling.rank, changed.annealing.cooling.rank) == (4, 2)
    assert changed == rayfed_lora.load_recipe("digits-vit", {"annealing.cooling.rank": 2})
    with pytest.raises(RecipeError, match=r"annealing.cooling.rank: expected at most heating.rank"):
        recipe.with_({"annealing.cooling.rank": 99})
    with pytest.raises(RecipeError, match=r"did you mean 'annealing.cooling.rank'"):
        recipe.with_({"annealing.cooling.rang": 2})


def test_a_result_is_opened_from_its_folder(result, tmp_path):
    again = Result.open(result.location)
    assert again.summary["adapter_sha256"] == result.summary["adapter_sha256"]
    assert len(again.rounds) == 2 and len(again.clients) == 6
    assert {"round", "text"} <= set(again.notes.columns)
    with pytest.raises(
        RunFolderError, match=r"expected the folder of a finished run.*found no run"
    ):
        Result.open(tmp_path)


def test_a_result_is_shown_in_one_line_and_as_a_table(result):
    text, page = repr(result), result._repr_html_()
    assert result.location in text and "sa-fedlora" in text and len(text) < 300
    assert page.startswith("<table>") and "test accuracy" in page


def test_the_adapter_and_the_merged_model_compute_the_same(result):
    pixels = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    with torch.no_grad():
        adapted = result.adapter()(pixel_values=pixels).logits
        merged = result.model()(pixel_values=pixels).logits
    assert adapted.shape == (1, 10)
    np.testing.assert_allclose(adapted.numpy(), merged.numpy(), atol=1e-5)
    assert float(adapted.std()) > 0


def test_a_plot_has_a_point_for_each_tested_round(result):
    (axes,) = result.plot().axes
    (line,) = axes.lines
    sent = result.rounds["bytes_up"] + result.rounds["bytes_down"]
    np.testing.assert_allclose(line.get_ydata(), result.rounds["eval_accuracy"])
    assert len(line.get_xdata()) == len(sent)


def test_a_run_without_an_adapter_says_so(tmp_path):
    recipe = Recipe.load("digits-vit").with_({**SMALL, "method": "fedavg"})
    full = rayfed_lora.run(recipe, str(tmp_path / "full"))
    with pytest.raises(BadInputError, match="no adapter"):
        full.adapter()
    assert full.model().config.num_labels == 10
