"""Adapters of chosen rounds (`storage.adapters_every`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig
from safetensors.numpy import load_file

import rayfed_lora
from rayfed_lora.errors import RunError, RunFolderError
from tests.fakes import FakeFactory, make_recipe
from tests.unit.test_start_from_adapter import SMALL


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "adapters").iterdir())


def recipe(**changes: Any) -> rayfed_lora.Recipe:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return rayfed_lora.Recipe.load(SMALL).with_(keys)


def test_the_adapter_of_every_second_round_is_that_of_a_run_that_ends_there(tmp_path: Path) -> None:
    """Three rounds, at ranks 4, 4 and 2; the second one is a run of two rounds."""
    rayfed_lora.run(recipe(storage__adapters_every=2), str(tmp_path / "a"))
    assert names(tmp_path / "a") == ["round-000002"]
    kept = tmp_path / "a" / "adapters" / "round-000002"
    assert PeftConfig.from_pretrained(str(kept)).r == 4
    short = recipe(annealing__cooling__rounds=0, annealing__mode="fixed")
    rayfed_lora.run(short, str(tmp_path / "b"))
    expected = weights(tmp_path / "b" / "adapter")
    found = weights(kept)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    base = Path(json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert base == kept / "base"
    assert (base / "config.json").is_file()
    assert "2 rounds" in (kept / "README.md").read_text()


def test_each_starts_a_run_of_its_own(tmp_path: Path) -> None:
    rayfed_lora.run(recipe(storage__adapters_every=1), str(tmp_path / "a"))
    kept = tmp_path / "a" / "adapters" / "round-000001"
    model = {"source": str(kept / "base"), "adapter": str(kept)}
    again = rayfed_lora.Recipe.load({**SMALL, "model": model})
    assert rayfed_lora.run(again, str(tmp_path / "b")).summary["rounds"] == 3


def test_full_model_rounds_have_none_and_all_is_under_checksums(tmp_path: Path) -> None:
    """Rounds 1 to 6; the first one trains the full model."""
    found = make_recipe(storage__adapters_every=1)
    rayfed_lora.run(found, str(tmp_path / "a"), factory=FakeFactory())
    assert names(tmp_path / "a") == [f"round-00000{t}" for t in range(2, 7)]
    sums = (tmp_path / "a" / "SHA256SUMS").read_text()
    kept = [path for path in (tmp_path / "a" / "adapters").rglob("*") if path.is_file()]
    assert kept
    assert all(path.relative_to(tmp_path / "a").as_posix() in sums for path in kept)
    kept[0].write_bytes(b"damaged")
    with pytest.raises(RunFolderError, match="adapters/round-"):
        rayfed_lora.run(found, str(tmp_path / "a"), resume=True, factory=FakeFactory())


def test_a_resumed_run_keeps_the_same_ones(tmp_path: Path) -> None:
    found = recipe(storage__adapters_every=1)

    def broken(done: rayfed_lora.FinishedRound) -> None:
        assert done.record.round < 2

    with pytest.raises(RunError):
        rayfed_lora.run(found, str(tmp_path / "a"), callbacks=[broken])
    rayfed_lora.run(found, str(tmp_path / "a"), resume=True)
    rayfed_lora.run(found, str(tmp_path / "b"))
    assert names(tmp_path / "a") == names(tmp_path / "b") == [f"round-00000{t}" for t in (1, 2, 3)]
    for name in names(tmp_path / "b"):
        one, other = (weights(tmp_path / run / "adapters" / name) for run in "ab")
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
