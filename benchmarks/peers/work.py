"""What every peer's runner needs of a workload file: no part of this project is imported here."""

from __future__ import annotations

import json
import os
import time
from functools import cached_property

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

Weights = dict[str, torch.Tensor]


class Work:
    """A workload: its data, cohorts and batches, and a PEFT model with its initial weights."""

    def __init__(self, path: str) -> None:
        self.arrays = np.load(path)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.cohorts = self.arrays["cohorts"]
        self.counts = self.arrays["counts"]
        self.batches = self.arrays["batches"]
        self.clients = len(self.counts)
        self.rounds = len(self.cohorts)
        self.train, self.labels = self._split("train")
        self.test, self.test_labels = self._split("test")

    def _split(self, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        keys = [k for k in self.arrays.files if k.startswith(f"{name}|") and "labels" not in k]
        inputs = {k.split("|")[1]: torch.from_numpy(self.arrays[k]) for k in keys}
        inputs = {k: v if v.is_floating_point() else v.long() for k, v in inputs.items()}
        return inputs, torch.from_numpy(self.arrays[f"{name}|labels"])

    @cached_property
    def model(self) -> torch.nn.Module:
        """The PEFT-wrapped model, built once a process."""
        values = dict(self.meta["config"])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        image = self.meta["task"] == "image-classification"
        auto = AutoModelForImageClassification if image else AutoModelForSequenceClassification
        net = auto.from_config(config)
        base = {k.split("|")[1]: self.arrays[k] for k in self.arrays.files if k.startswith("base|")}
        net.load_state_dict({k: torch.from_numpy(v) for k, v in base.items()}, strict=False)
        modules = [k.split("|")[1] for k in self.arrays.files if k.startswith("lora_A|")]
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules=modules, modules_to_save=["classifier"]
        )
        model = get_peft_model(net, lora)
        state = {}
        for name, _ in trainables(model).items():
            key = plain(name).removeprefix("base_model.model.")
            part = next((p for p in ("lora_A", "lora_B") if f".{p}." in key), None)
            found = f"head|{key}" if part is None else f"{part}|{key.split(f'.{part}.')[0]}"
            state[name] = torch.from_numpy(self.arrays[found])
        put(model, state)
        return model.train()

    def index(self, t: int, client: int) -> np.ndarray:
        """Return the (steps, batch) rows of one client in one round."""
        (place,) = np.flatnonzero(self.cohorts[t] == client)
        return self.batches[t, place]

    def update(self, weights: Weights, t: int, client: int) -> tuple[Weights, int]:
        """Load weights, train a client, return its weights and its number of examples."""
        put(self.model, weights)
        optimizer = torch.optim.SGD(trainables(self.model).values(), lr=self.meta["lr"])
        for rows in torch.from_numpy(self.index(t, client)):
            optimizer.zero_grad(set_to_none=True)
            self.loss({k: v[rows] for k, v in self.train.items()}, self.labels[rows]).backward()
            optimizer.step()
        return taken(self.model), int(self.counts[client])

    def loss(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        return torch.nn.functional.cross_entropy(self.model(**inputs).logits, labels)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the test accuracy of the model as it is."""
        self.model.eval()
        right = 0
        for start in range(0, len(self.test_labels), 256):
            inputs = {k: v[start : start + 256] for k, v in self.test.items()}
            labels = self.test_labels[start : start + 256]
            right += int((self.model(**inputs).logits.argmax(1) == labels).sum())
        self.model.train()
        return right / len(self.test_labels)


def plain(name: str) -> str:
    """Return a parameter's name as in a PEFT checkpoint."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def trainables(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def taken(model: torch.nn.Module) -> Weights:
    """Return a copy of the trained weights."""
    return {n: p.detach().clone() for n, p in trainables(model).items()}


@torch.no_grad()
def put(model: torch.nn.Module, weights: Weights) -> None:
    """Set the trained weights."""
    for name, parameter in trainables(model).items():
        parameter.copy_(weights[name])


class Record:
    """When rounds ended, how well they tested, and the final weights."""

    def __init__(self, out: str) -> None:
        self.out, self.ends, self.accuracy = out, [], []

    def round_done(self, accuracy: float) -> None:
        """Note a round's end."""
        self.ends.append(time.time())
        self.accuracy.append(accuracy)

    def save(self, weights: Weights) -> None:
        """Write all."""
        arrays = {plain(n): np.ascontiguousarray(w.detach().numpy()) for n, w in weights.items()}
        save_file(arrays, self.out + ".safetensors")
        with open(self.out, "w") as file:
            json.dump({"ends": self.ends, "accuracy": self.accuracy}, file)
