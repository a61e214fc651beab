"""Whole runs on digits beside plain loops of torch and peft that know nothing of this package.

Clients take all their examples in each step, so that no draw decides anything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import rayfed_lora
from rayfed_lora.data.examples import COUNTED
from rayfed_lora.training.preparing import prepare
from tests.chats import character_tokenizer, chat_recipe, short_tasks, write_formats

Tensors = dict[str, torch.Tensor]
Data = list[tuple[torch.Tensor, torch.Tensor]]
# Clients of different sizes; 40 other images are the test split.
SIZES, STEPS, LR, ROUNDS = (12, 20, 28), 4, 0.3, 3
LORA = {"r": 2, "lora_alpha": 4}


def pixels(images: npt.NDArray[Any]) -> torch.Tensor:
    """Whole numbers from 0 to 255 as they are prepared for a model without a processor."""
    return torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 127.5 - 1


@pytest.fixture(scope="module")
def digits() -> tuple[tuple[pd.DataFrame, pd.DataFrame], Data]:
    """The rows as a user has them, and the same of each client as tensors."""
    found = load_digits()
    images = (found.images * 15).astype(np.uint8)
    count = sum(SIZES)
    names = [name for name, size in zip("abc", SIZES, strict=True) for _ in range(size)]
    train = pd.DataFrame({"image": [*images[:count]], "label": found.target[:count], "who": names})
    held = slice(count, count + 40)
    test = pd.DataFrame({"image": [*images[held]], "label": found.target[held], "who": "a"})
    edges = np.cumsum([0, *SIZES])
    clients = [
        (pixels(images[low:high]), torch.tensor(found.target[low:high]))
        for low, high in pairwise(edges)
    ]
    return (train, test), clients


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small vision transformer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = ViTConfig(
        **sizes, num_attention_heads=2, image_size=8, patch_size=4, num_channels=1, num_labels=10
    )
    folder = tmp_path_factory.mktemp("source")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def recipe(source: Path, **settings: Any) -> rayfed_lora.Recipe:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    found = rayfed_lora.Recipe.load(
        {
            "data": {"partition": {"kind": "column", "column": "who"}},
            "model": {"source": str(source)},
            "annealing": {
                "initiating": {"rounds": 0, "trainable": "none"},
                "heating": {"rounds": ROUNDS, "rank": 2},
                "cooling": {"rounds": 0},
                "holding": {"rounds": 0},
            },
            "clients": {
                "per_round": 3,
                "local_steps": STEPS,
                "batch_size": 64,
                "optimizer": {"lr": LR},
            },
            "runtime": {"executor": "local", "device": "cpu"},
        }
    )
    return found.with_(keys)


def network(source: Path) -> Any:
    return ViTForImageClassification.from_pretrained(source)


def federated(
    net: Any,
    clients: Data,
    trained: Tensors,
    corrected: Callable[[int, str, torch.Tensor, torch.Tensor], torch.Tensor],
    ended: Callable[[int, Tensors, Tensors], None] = lambda client, before, after: None,
    rounds: int = ROUNDS,
) -> Tensors:
    """FedAvg (arXiv:1602.05629, algorithm 1) of some parameters of a model, weighted by examples.

    `corrected(client, name, gradient, value)` is the gradient that a step takes; `ended` is called
    with what a client started from and ended with.
    """
    state = {name: value.detach().clone() for name, value in trained.items()}
    for _ in range(rounds):
        total: Tensors = {name: torch.zeros_like(value) for name, value in state.items()}
        for client, (inputs, labels) in enumerate(clients):
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(state[name])
            for _ in range(STEPS):
                loss = functional.cross_entropy(net(pixel_values=inputs).logits, labels)
                gradients = torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
                with torch.no_grad():
                    for (name, parameter), found in zip(trained.items(), gradients, strict=True):
                        own = torch.zeros_like(parameter) if found is None else found
                        step = corrected(client, name, own, parameter - state[name])
                        parameter.sub_(LR * step)
            after = {name: parameter.detach().clone() for name, parameter in trained.items()}
            ended(client, state, after)
            share = len(labels) / sum(SIZES)
            total = {name: total[name] + share * after[name] for name in total}
        state = total
    return state


def plain(client: int, name: str, gradient: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return gradient


def assert_same(found: Mapping[str, torch.Tensor], expected: Tensors) -> None:
    """Equal but for float32 rounding, and moved from the start by much more than that."""
    assert set(found) >= set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=2e-5, err_msg=name)


def exported(folder: Path) -> Tensors:
    return {name: p.detach() for name, p in network(folder / "base").named_parameters()}


def test_fedavg_is_a_plain_loop(digits: Any, source: Path, tmp_path: Path) -> None:
    frames, clients = digits
    rayfed_lora.run(recipe(source, method="fedavg"), str(tmp_path / "a"), data=frames)
    net = network(source)
    expected = federated(net, clients, dict(net.named_parameters()), plain)
    assert_same(exported(tmp_path / "a"), expected)


def test_fedprox_is_a_plain_loop_with_its_term(digits: Any, source: Path, tmp_path: Path) -> None:
    """mu = 0.5: the gradient of mu / 2 |w - w_t|^2 is mu (w - w_t) (arXiv:1812.06127, eq. 2)."""
    frames, clients = digits
    settings = recipe(
        source, method="fedavg", clients__objective={"name": "proximal", "weight": 0.5}
    )
    rayfed_lora.run(settings, str(tmp_path / "a"), data=frames)
    net = network(source)
    parameters = dict(net.named_parameters())
    expected = federated(net, clients, parameters, lambda k, n, g, moved: g + 0.5 * moved)
    assert_same(exported(tmp_path / "a"), expected)
    without = federated(network(source), clients, parameters, plain)
    assert max(float((without[n] - expected[n]).abs().max()) for n in expected) > 1e-3


def test_scaffold_is_a_plain_loop_with_variates(digits: Any, source: Path, tmp_path: Path) -> None:
    """Option II of arXiv:1910.06378, algorithm 1; all clients take part."""
    frames, clients = digits
    rayfed_lora.run(
        recipe(source, method="fedavg", clients__objective="scaffold"),
        str(tmp_path / "a"),
        data=frames,
    )
    net = network(source)
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    # c of the round, and what clients change it by until its end.
    server, coming = copy.deepcopy(zeros), copy.deepcopy(zeros)
    own = [copy.deepcopy(zeros) for _ in clients]
    seen = []

    def corrected(k: int, name: str, gradient: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        return gradient - own[k][name] + server[name]

    def ended(k: int, before: Tensors, after: Tensors) -> None:
        for name in zeros:
            new = own[k][name] - server[name] + (before[name] - after[name]) / (STEPS * LR)
            coming[name] += (new - own[k][name]) / len(clients)
            own[k][name] = new
        seen.append(k)
        if len(seen) % len(clients) == 0:
            for name in zeros:
                server[name] += coming[name]
                coming[name].zero_()

    expected = federated(net, clients, dict(net.named_parameters()), corrected, ended)
    assert_same(exported(tmp_path / "a"), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_fedlora_is_a_plain_loop_of_peft(digits: Any, source: Path, tmp_path: Path) -> None:
    """Means of A, of B and of the head apart (FedIT), from the same adapter."""
    frames, clients = digits
    torch.manual_seed(1)
    config = LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    net = get_peft_model(network(source), config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    net.save_pretrained(tmp_path / "adapter")
    settings = recipe(
        source,
        method="fedlora",
        model__adapter=str(tmp_path / "adapter"),
        adapter__alpha=LORA["lora_alpha"],
    )
    rayfed_lora.run(settings, str(tmp_path / "a"), data=frames)
    found = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    ends = federated(net, clients, trained, plain)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(ends[name])
    expected = get_peft_model_state_dict(net)
    assert set(found) == set(expected)
    assert_same(found, expected)
    # And as peft reads it.
    set_peft_model_state_dict(net, found)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_instruction_tuning_is_a_plain_loop_of_peft_in_float64(tmp_path: Path) -> None:
    """A round of three clients from the same adapter, losses over responses: within 1e-6."""
    write_formats(tmp_path, short_tasks())
    character_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    net = get_peft_model(base, LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]))
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    net.save_pretrained(tmp_path / "adapter")
    settings = chat_recipe(
        tmp_path,
        model__source=str(tmp_path / "base"),
        model__config={},
        model__adapter=str(tmp_path / "adapter"),
        adapter__alpha=LORA["lora_alpha"],
        clients__local_steps=3,
        clients__batch_size=64,
        clients__optimizer={"name": "sgd", "lr": 0.2},
    )
    rayfed_lora.run(settings, str(tmp_path / "run"))
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    workload = prepare(settings)
    net.double()
    start = {name: p.detach().clone() for name, p in trained.items()}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    sizes = workload.clients.counts
    for client in range(3):
        rows = workload.train.rows(workload.clients.examples(client))
        ids, mask, counted = (
            torch.tensor(rows.inputs[name]).long()
            for name in ("input_ids", "attention_mask", COUNTED)
        )
        labels = ids.masked_fill((counted == 0) | (mask == 0), -100)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        for _ in range(3):
            loss = net(input_ids=ids, attention_mask=mask, labels=labels).loss
            gradients = torch.autograd.grad(loss, [*trained.values()])
            with torch.no_grad():
                for parameter, gradient in zip(trained.values(), gradients, strict=True):
                    parameter.sub_(0.2 * gradient)
        for name, parameter in trained.items():
            total[name] += parameter.detach() * float(sizes[client] / sizes.sum())
    moved = 0.0
    for name, expected in total.items():
        key = name.replace(".default", "")
        np.testing.assert_allclose(found[key], expected, rtol=0, atol=1e-6, err_msg=name)
        moved = max(moved, float((expected - start[name]).abs().max()))
    assert moved > 1e-3
