"""What a benchmark brings in place of the product's own parts fits where it goes."""

from __future__ import annotations

import inspect
from pathlib import Path
from runpy import run_path

import pytest

from rayfed_lora.data.examples import Examples
from rayfed_lora.training.protocol import Trainer

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"
METHODS = [name for name in vars(Trainer) if not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_of_the_scale_benchmark_is_called_as_any_other(name: str) -> None:
    own = getattr(run_path(str(SCALE))["AddingTrainer"], name)
    assert list(inspect.signature(own).parameters) == list(
        inspect.signature(getattr(Trainer, name)).parameters
    )


def test_the_data_of_the_gpu_benchmark_are_those_of_a_run() -> None:
    gpu = run_path(str(SCALE.with_name("gpu.py")))
    workload = gpu["RandomFactory"]().workload(gpu["recipe"]("vit", True))
    splits = (workload.train, workload.validation, workload.test)
    assert all(isinstance(split, Examples) for split in splits)
    assert [len(split) for split in splits] == [64 * 32, 0, 16]
