"""The cases of `same_bits.py`: which recipes two checkouts must compute alike, by name.

Small recipes as those of the tests: real training of tiny models on scikit-learn's digits, and on
texts that are made here. What the recipe's schema enumerates is a case by itself, so that a new
schedule, rule or method is one without an edit here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("initiating", "heating", "cooling", "holding")
SHIPPED = {
    **{f"annealing.{stage}.rounds": 1 for stage in STAGES},
    "annealing.cooling.rounds": 2,
    "clients.local_steps": 3,
    "clients.per_round": 4,
    "evaluation.every": 5,
}
VIT = {
    "architecture": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
}
DIGITS: dict[str, Any] = {
    "name": "digits",
    "seed": 3,
    "data": {"source": "digits", "max_examples": 400, "partition": {"clients": 12}},
    "model": {"source": "config", "config": VIT},
    "adapter": {"alpha": 8},
    "annealing": {
        "initiating": {"rounds": 1},
        "heating": {"rounds": 2, "rank": 4},
        "cooling": {"rounds": 3, "rank": 1},
        "holding": {"rounds": 1},
    },
    "clients": {"per_round": 5, "local_steps": 2, "batch_size": 8},
    "evaluation": {"every": 3},
    "storage": {"checkpoint_every": 100},
    "runtime": {"device": "cpu"},
}
BERT = {
    "architecture": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
LLAMA = {**BERT, "architecture": "llama", "num_key_value_heads": 2}
WORDS = ["how", "many", "who", "is", "where", "the", "dog", "cat", "moon", "far", "old"]
TESTED = {"evaluation.client_fraction": 0.3, "evaluation.clients_every": 2}
FIXED = {"annealing.mode": "fixed"}
# What a value of the schema's enumerations needs beside it.
BESIDE: dict[str, dict[str, Any]] = {
    "annealing.acceptance": {
        "annealing.temperature": 1e-7,
        "annealing.target.tolerance": 0.0,
        "clients.optimizer.lr": 0.5,
    },
    "annealing.target.metric": {"annealing.acceptance": "target"},
    "data.partition.kind": {"data.partition.column": "label", "clients.per_round": 0.4},
}
# Named below, or no matter of results.
NOT_VARIED = re.compile(
    r"runtime\.(executor|device)|model\.task|tracking\..*|aggregation\..*|.*\.distribution"
)
# Each aggregation rule with each of these.
WITH_RULES: dict[str, dict[str, Any]] = {
    "staged": {},
    "mixed ranks": {"clients.ranks": [1, 2, 4]},
    "folding": {"annealing.cooling.residual": "fold"},
    "spectral": {"annealing.allocation": "spectral"},
    "tested on clients": {**FIXED, **TESTED},
}
DEVICES = {
    "clients.speed": {"median": 2.0, "sigma": 0.5},
    "network": {"up_mbps": 0.1, "down_mbps": {"distribution": "uniform", "low": 1, "high": 9}},
}
ADAMW = {"clients.optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1}}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one client a block": {"runtime.cohort_size": 1},
    "two clients a block": {"runtime.cohort_size": 2},
    "clients apart, more than 64 calls": {
        "data.partition.clients": 80,
        "clients.per_round": 70,
        "clients.local_steps": 1,
        "runtime.cohort_size": 1,
        "annealing.cooling.rounds": 1,
    },
    "folding, spectral, rslora": {
        "annealing.cooling.residual": "fold",
        "annealing.allocation": "spectral",
        "adapter.scaling": "rslora",
        "adapter.target_modules": "all-linear",
    },
    "all-linear, two layers": {
        "adapter.target_modules": "all-linear",
        "model.config.num_hidden_layers": 2,
    },
    "ranks by shares": {"aggregation.rule": "product-svd", "clients.ranks": {1: 0.5, 4: 0.5}},
    "adapter dropout": {"adapter.dropout": 0.2},
    "model dropout": {"model.config.hidden_dropout_prob": 0.2},
    "adamw, weight decay, clipped": {**ADAMW, "clients.max_grad_norm": 0.5},
    "sgd with momentum": {"clients.optimizer": {"name": "sgd", "momentum": 0.9}},
    "proximal": {
        "annealing.initiating": {"trainable": "adapter", "rounds": 3, "proximal_weight": 1.0}
    },
    "epochs": {"clients.local_epochs": 2, "clients.local_steps": None},
    "warm-up": {"clients.lr_schedule": {"shape": "cosine", "warmup_rounds": 2}},
    "metropolis, hot": {"annealing.acceptance": "metropolis", "annealing.temperature": 5.0},
    "clients leave": {"clients.availability": 0.4},
    "simulated devices": DEVICES,
    "deadline": {**DEVICES, "clients.deadline_s": 14.0},
    "over-selection": {**DEVICES, "clients.over_select": 1.5},
    "folding, clients leave": {
        "clients.availability": 0.4,
        "annealing.cooling.residual": "fold",
        "aggregation.rule": "product-svd",
    },
    "some clients tested": {**TESTED, "evaluation.clients": 4},
    "some labels": {"data.labels": [3, 5, 8], "data.max_examples": 200},
}
ON_TEXTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout, adamw": {**ADAMW, "adapter.dropout": 0.1},
    "one client a block": {"runtime.cohort_size": 1},
    "tested on clients": {**TESTED, "aggregation.rule": "share-a", **FIXED},
}


@dataclass(frozen=True)
class Case:
    """A recipe and what is set in it."""

    recipe: str | Mapping[str, Any]
    settings: Mapping[str, Any]


def enumerated(
    schema: Mapping[str, Any], under: str = "", ref: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield each key of a recipe that takes one of a few values, with each of these values."""
    section = schema["$defs"][ref.rpartition("/")[2]] if ref else schema
    for key, entry in section["properties"].items():
        kinds = [entry, *entry.get("anyOf", ())]
        for kind in kinds:
            values = [True, False] if kind.get("type") == "boolean" else kind.get("enum", ())
            yield from ((f"{under}{key}", value) for value in values)
            if "$ref" in kind:
                yield from enumerated(schema, f"{under}{key}.", kind["$ref"])


def on_texts(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Write texts and a tokenizer into a folder; return a recipe for each task on texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = [
        {"text": " ".join(WORDS[(i * j) % 11] for j in range(1, 2 + i % 7)), "label": f"c{i % 3}"}
        for i in range(90)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(str(folder / "tokenizer"))
    partition = {"kind": "iid", "clients": 8}
    data = {"source": str(folder / "texts.jsonl"), "max_length": 8, "partition": partition}
    given = {"source": "config", "tokenizer": str(folder / "tokenizer")}
    return {
        task: {
            **DIGITS,
            "name": task,
            "data": data,
            "model": {**given, "task": task, "config": net},
        }
        for task, net in (("text-classification", BERT), ("causal-lm", LLAMA))
    }


def table(checkouts: tuple[Path, Path], texts: Path) -> dict[str, Case]:
    """Return all cases by name; what only one checkout knows is a case too."""
    found: dict[str, Case] = {}
    values: dict[str, dict[Any, None]] = {}
    for checkout in checkouts:
        package = checkout / "rayfed_lora"
        for path in sorted(package.rglob("recipes/*.yaml")):
            found[f"shipped {path.stem}"] = Case(path.stem, SHIPPED)
        schema = json.loads(next(package.rglob("recipe.schema.json")).read_text())
        for key, value in enumerated(schema):
            values.setdefault(key, {})[value] = None
    small = dict(OTHERS)
    for key, each in values.items():
        if not NOT_VARIED.fullmatch(key):
            small |= {f"{key} {value}": {**BESIDE.get(key, {}), key: value} for value in each}
    optimizer = "aggregation.server_optimizer.name"
    for rule in values["aggregation.rule"]:
        of_rule = WITH_RULES | {f"fixed, {o}": {**FIXED, optimizer: o} for o in values[optimizer]}
        small |= {f"rule {rule}, {k}": {"aggregation.rule": rule, **s} for k, s in of_rule.items()}
    found |= {name: Case(DIGITS, settings) for name, settings in small.items()}
    for task, recipe in on_texts(texts).items():
        found |= {f"{task}, {name}": Case(recipe, settings) for name, settings in ON_TEXTS.items()}
    return found
