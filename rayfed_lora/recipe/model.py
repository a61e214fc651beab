"""The base model and its adapter: sections of the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rayfed_lora.plugins.models import FACTS
from rayfed_lora.plugins.registry import Method
from rayfed_lora.plugins.tables import MODELS
from rayfed_lora.recipe.fields import Auto, Fraction, PositiveFloat, Section, option
from rayfed_lora.recipe.plain_values import unsupported

# transformers' class for each task.
AUTO_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


class Model(Section):
    """The base model.

    An own model is a `source` with its options beside it; resolved recipes have it as the
    `architecture` in `config`.
    """

    task: Literal["image-classification", "text-classification", "causal-lm"] = option(
        "image-classification", "task that the model is trained for"
    )
    source: str = option(
        "config",
        "config (random initial weights), package:<name>[/<folder>] (a model inside an installed"
        " Python package), a local folder, a .gguf file, alone or as package:<name>/<file>.gguf, a"
        " hub id, or an own model, whose options stand beside it",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "how the large frozen weights are kept: auto: as in the source on a GPU, float32 on a CPU;"
        " arithmetic is that of runtime.precision, factors are float32",
    )
    tokenizer: str | None = option(
        None, "source of the tokenizer, in the form of `source`; null: the model's own source"
    )
    adapter: str | None = option(
        None,
        "folder of a PEFT adapter to start from, or of a run that has one; null: new factors",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="for source config: `architecture` (vit, bert, ...) and transformers' own"
        " names; for other sources: values that override the model's configuration",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_own(cls, given: Any) -> Any:
        source = given.get("source") if isinstance(given, Mapping) else None
        if not isinstance(source, str) or source not in MODELS:
            return given
        method = MODELS.method(source)
        fields, own = cls.model_fields, method.options.model_fields
        options = {key: value for key, value in given.items() if key not in fields and key in own}
        kept = {key: value for key, value in given.items() if key not in options}
        written = given.get("config") or {}
        # That of a model that this one replaces.
        of_another = (
            not isinstance(written, Mapping) or written.get("architecture", source) != source
        )
        config = {**({} if of_another else written), **options, "architecture": source}
        named = {"task": method.value.task, **kept}
        return {**named, "source": "config", "config": config}

    @property
    def own(self) -> Method[Any] | None:
        """The own model that is chosen, if any."""
        name = self.config.get("architecture") if self.source == "config" else None
        return MODELS.method(name) if isinstance(name, str) and name in MODELS else None

    @model_validator(mode="after")
    def _fits_own(self) -> Model:
        if self.own is None:
            return self
        task = self.own.value.task
        if self.task != task:
            raise PydanticCustomError(
                "own_model", f"expected task {task} with own model {self.own.name!r}"
            )
        others = {"architecture", "num_labels", *FACTS[task]}
        options = {key: v for key, v in self.config.items() if key not in others}
        try:
            self.own.options.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise PydanticCustomError(
                "own_model", f"option {key} of own model {self.own.name!r}: {first['msg']}"
            ) from None
        return self

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
