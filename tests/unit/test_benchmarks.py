"""What a benchmark brings in place of the product's own parts fits where it goes."""

from __future__ import annotations

import inspect
from pathlib import Path
from runpy import run_path

import pytest

from rayfed_lora.training.protocol import Trainer

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"
METHODS = [name for name in vars(Trainer) if not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_of_the_scale_benchmark_is_called_as_any_other(name: str) -> None:
    own = getattr(run_path(str(SCALE))["AddingTrainer"], name)
    assert list(inspect.signature(own).parameters) == list(
        inspect.signature(getattr(Trainer, name)).parameters
    )
