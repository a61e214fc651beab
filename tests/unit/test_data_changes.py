"""The SHA-256 of a run's examples, by which comparisons tell that a source has changed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.plugins import data
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.runs.summary import data_summary
from tests.unit.test_own_data import SMALL

pytestmark = pytest.mark.usefixtures("forgotten_methods")


def test_a_comparison_tells_that_a_function_returns_other_rows(tmp_path, capsys):
    kept = {"pixel": 7}

    @data("moving-of-a-test")
    def moving(*, rows: int = 40):
        pixels = np.full((rows, 4, 4), kept["pixel"], np.uint8)
        return pd.DataFrame({"image": list(pixels), "label": np.arange(rows) % 2})

    recipe = load_recipe(SMALL | {"name": "own"}, plugins=[moving(rows=44)])

    def compared(*methods):
        return rayfed_lora.compare(recipe, methods, str(tmp_path), plugins=[moving])

    first = compared("fedlora", "rolora").runs
    assert first["data_sha256"].nunique() == 1
    assert "cannot be compared" not in capsys.readouterr().err
    kept["pixel"] = 8
    both = compared("fedlora", "rolora", "ffa-lora").runs.set_index("method")["data_sha256"]
    # The finished ones are not run again.
    assert both["fedlora"] == both["rolora"] == first["data_sha256"][0] != both["ffa-lora"]
    told = capsys.readouterr().err
    assert f"ffa-lora/seed-0: its examples (data_sha256 {both['ffa-lora'][:12]}) are not" in told
    assert "rolora/seed-0: its examples" not in told


def test_the_hash_is_of_the_rows_and_not_of_how_they_are_dealt():
    parts = {"training examples": "a", "validation examples": "b", "test examples": "c"}
    parts |= {"names of classes": "d", "examples of each client": "e"}
    one = data_summary(parts)["data_sha256"]
    assert data_summary(parts | {"examples of each client": "f"})["data_sha256"] == one
    assert data_summary(parts | {"test examples": "f"})["data_sha256"] != one
    assert data_summary({}) == {}
