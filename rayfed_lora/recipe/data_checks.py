"""Which data go with which model."""

from __future__ import annotations

from collections.abc import Iterator

from rayfed_lora.recipe.settings import Settings

_Found = tuple[tuple[str, ...], str]


def data_conflicts(recipe: Settings) -> Iterator[_Found]:
    """Yield keys and message of each conflict of data and model."""
    partition, model = recipe.data.partition, recipe.model
    if partition.kind == "column" and partition.column is None:
        yield (
            ("data.partition.column", "data.partition.kind"),
            "partition kind 'column' needs the name of a data column, got null",
        )
    if model.source == "config" and not isinstance(model.config.get("architecture"), str):
        yield (
            ("model.config.architecture", "model.config", "model.source"),
            "model source 'config' needs a transformers model type such as vit or bert",
        )
    annealing = recipe.annealing
    first = annealing.initiating_rounds > 0 and annealing.initiating.trainable == "full"
    if model.adapter is not None and (annealing.mode == "full" or first):
        yield (
            ("model.adapter", "annealing.mode", "annealing.initiating.trainable", "method"),
            "expected null with full-model rounds, which train no adapter, got"
            f" {model.adapter!r}; annealing.initiating.trainable may be adapter or none",
        )
    if model.task == "causal-lm" and recipe.adapter.train_head:
        yield (
            ("adapter.train_head", "model.task", "method"),
            "expected false with model.task 'causal-lm', whose output layer is its vocabulary and"
            " stays frozen, got true",
        )
    yield from _turn_conflicts(recipe)


def _turn_conflicts(recipe: Settings) -> Iterator[_Found]:
    """Yield settings of instruction and chat data, and of packing, that others rule out."""
    data, task = recipe.data, recipe.model.task
    harness = recipe.evaluation.harness
    if harness.tasks and task != "causal-lm":
        yield (
            ("evaluation.harness.tasks", "model.task"),
            f"expected none with model.task {task!r}: the harness tests language models",
        )
    if not harness.tasks and harness != type(harness)():
        yield (
            ("evaluation.harness.tasks",),
            "expected one task or more beside other keys of evaluation.harness, got none",
        )
    responds = task == "causal-lm" and data.format.kind != "text"
    if recipe.evaluation.generate is not None and not responds:
        yield (
            ("evaluation.generate", "model.task", "data.format.kind"),
            "expected null but with instruction or chat data of a causal-lm, which have responses"
            f" to compare with, got model.task {task!r} and data.format {data.format.kind!r}",
        )
    turned, kind = data.format.kind in ("instruction", "chat"), data.format.kind
    if turned and task != "causal-lm":
        yield (
            ("data.format.kind", "model.task"),
            f"expected auto or text with model.task {task!r}, got {kind!r}: only a causal-lm learns"
            " responses",
        )
    if data.packing and task != "causal-lm":
        yield (
            ("data.packing", "model.task"),
            f"expected false with model.task {task!r}, got true: only texts of a causal-lm are"
            " packed",
        )
    if turned and data.text_column != "auto":
        yield (
            ("data.text_column", "data.format.kind"),
            f"expected auto with data.format {kind!r}, whose columns are known by their names, got"
            f" {data.text_column!r}",
        )
