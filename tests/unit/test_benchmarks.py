"""What a benchmark brings in place of the product's own parts fits where it goes."""

from __future__ import annotations

import inspect
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from rayfed_lora.training.protocol import Trainer

from rayfed_lora.data.examples import Examples

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


def test_the_workload_of_the_side_by_side_is_written_whole(tmp_path: Path) -> None:
    write = run_path(str(SCALE.with_name("workloads.py")))["write"]
    write("W", str(tmp_path / "W.npz"))
    with np.load(tmp_path / "W.npz") as found:
        kinds = {name.partition("|")[0] for name in found.files}
        assert kinds == {
            *("meta", "cohorts", "batches", "counts", "train", "test"),
            *("base", "head", "lora_A", "lora_B"),
        }
        rounds, clients, steps, size = found["batches"].shape
        assert found["cohorts"].shape == (rounds, clients) and steps > 0 and size > 0
