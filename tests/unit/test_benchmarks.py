"""What a benchmark brings in place of the product's own parts fits where it goes."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import numpy as np

from rayfed_lora.data.examples import Examples
from rayfed_lora.engines.factory import in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.tasks.messages import Evaluate, Export, Initial, TestClients, Train
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel
from tests.fakes import make_recipe
from tests.tasks import local_plan

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"


def test_the_trainer_of_the_scale_benchmark_answers_every_task() -> None:
    engine = LocalEngine(
        lambda: in_process(make_recipe(), run_path(str(SCALE))["AddingFactory"](), "cpu")
    )
    population = engine.open()
    assert (population.clients, population.examples["test"]) == (6, 8)
    dense = engine.submit(Initial("adapter")).result()
    factors = {
        name: Factors(np.zeros((2, m.d_in), np.float32), np.zeros((m.d_out, 2), np.float32), 1.0)
        for name, m in population.shape.modules.items()
    }
    model = GlobalModel(AdapterState(factors, dense), Base(), "adapter")
    found = engine.submit(
        Train(model, local_plan(), "factor-average", blocks=((3, 1), (0,)))
    ).result()
    assert [report.client for report in found.reports] == [3, 1, 0]
    # The mean of what clients 3, 1 and 0 add.
    np.testing.assert_allclose(found.means.tensors()["head"], 4 / 3)
    parts = engine.submit(Evaluate(model, "test", (slice(0, 5), slice(5, 8)))).result()
    assert [len(part.labels) for part in parts] == [5, 3]
    assert engine.submit(TestClients(model, ((0, 1),))).result() == ()
    assert engine.submit(Export(model)).result() == {}
    engine.close()


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
