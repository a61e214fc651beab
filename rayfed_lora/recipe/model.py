"""The base model and its adapter: sections of the recipe."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator

from rayfed_lora.recipe.fields import Auto, Fraction, PositiveFloat, Section, option
from rayfed_lora.recipe.plain_values import unsupported

# transformers' class for each task.
AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


class Model(Section):
    """The base model."""

    task: Literal["image-classification", "text-classification", "causal-lm"] = option(
        "image-classification", "task that the model is trained for"
    )
    source: str = option(
        "config",
        "config (random initial weights), package:<name>[/<folder>] (a model inside an installed"
        " Python package), a local folder, or a hub id",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "how the large frozen weights are kept: auto: as in the source on a GPU, float32 on a CPU;"
        " arithmetic is that of runtime.precision, factors are float32",
    )
    tokenizer: str | None = option(
        None, "source of the tokenizer, in the form of `source`; null: the model's own source"
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="for source config: `architecture` (vit, bert, ...) and transformers' own"
        " names; for other sources: values that override the model's configuration",
    )

    @field_validator("config")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        found = unsupported(value)
        if found is not None:
            raise ValueError(f"expected texts, finite numbers, true, false and null, got {found}")
        # JSON makes keys texts: YAML's {0: cat} reads back from the resolved recipe as {"0": cat}.
        named: dict[str, Any] = json.loads(json.dumps(value))
        return named


class Adapter(Section):
    """The modules that get LoRA factors, and the scale of these."""

    target_modules: str | list[str] = option(
        "auto",
        "auto (query and value projections), all-linear (all but the head), a list of name"
        " endings, or one regular expression over full names",
    )
    alpha: PositiveFloat = option(16.0, "LoRA alpha: the scale is alpha / heating.rank")
    dropout: Fraction = option(0.0, "dropout before the factors")
    scaling: Literal["constant", "alpha_over_rank", "rslora"] = option(
        "constant",
        "constant: alpha / heating.rank for the whole run | alpha_over_rank: alpha / rank"
        " | rslora: alpha / sqrt(rank); no mode changes the update when the rank changes",
    )
    train_head: bool = option(
        True,
        "train, send and average the task head too; language models have no head: default false",
    )
    train_biases: bool = option(False, "train, send and average every bias too (BitFit)")
    head_modules: list[str] | Auto = option(
        "auto", "module names that make up the head; auto: the modules after the model's encoder"
    )
