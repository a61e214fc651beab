"""The test that clients trained in one batch get the results that each would get alone.

A run and a plan test a few examples: a run with its weights, a plan with random ones, and small
models only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rayfed_lora.data.examples import Batch, Examples
from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models, base_weights
from rayfed_lora.models.causes import tried
from rayfed_lora.models.mixing import Verdict, verdict_on
from rayfed_lora.models.wording import one_line
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.drawing import tensors
from rayfed_lora.types import ModelShape

# Number of tested examples: the shortest, the longest and one between.
_EXAMPLES = 3
# Maximum tokens of a tested text, and the tokens that truncation leaves to each text.
_LONGEST, _SHORTEST = 64, 8
# Attention of BigBird's kind, whose pattern depends on the length.
_BLOCKS = "block_sparse"
# Parameters of a model that can be initialised in half a second.
_MOST_RANDOM = 30_000_000


def examined(net: nn.Module, examples: Examples) -> Verdict:
    """Return whether a model computes a few examples in one batch as it does alone.

    Long texts are shortened by the same factor, to their first tokens and the last one; except for
    models that attend to blocks of tokens, which use full attention on short texts. The net is the
    plain model with its source's weights, on the CPU in float32, whatever the run uses.

    Raises:
        ModelError: the model cannot compute an example alone.
    """
    if len(examples) < 2:
        return Verdict()
    mask = examples.inputs.get("attention_mask")
    lengths = np.zeros(len(examples), np.int64) if mask is None else mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    rows = order[np.unique(np.linspace(0, len(order) - 1, _EXAMPLES).astype(np.int64))]
    few = examples.rows(rows)
    config = getattr(net, "config", None)
    if mask is not None and getattr(config, "attention_type", None) != _BLOCKS:
        few = _shortened(few, lengths[rows])
    chosen = Examples.of(few.inputs, few.labels)
    alone = [tensors(chosen.rows(np.array([i])))[0] for i in range(len(rows))]
    try:
        return verdict_on(net, tensors(few)[0], alone)
    except Exception as error:  # models raise errors of many types
        raise ModelError(
            f"model: {type(net).__name__} cannot compute an example of the data:"
            f" {one_line(error).rstrip('.')}; check model.tokenizer and the data"
        ) from error


def _shortened(texts: Batch, lengths: npt.NDArray[np.int64]) -> Batch:
    """Return texts of at most `_LONGEST` tokens, in the same order of lengths."""
    longest = int(lengths.max())
    if longest <= _LONGEST:
        return texts
    kept = np.maximum(lengths * _LONGEST // longest, np.minimum(lengths, _SHORTEST))[:, None]
    lengths = lengths[:, None]
    # Columns to take: the first tokens, the last one, then padding, which follows the last one.
    columns = np.broadcast_to(np.arange(_LONGEST), (len(kept), _LONGEST))
    padding = np.minimum(lengths, longest - 1)
    columns = np.select([columns < kept - 1, columns == kept - 1], [columns, lengths - 1], padding)
    inputs = {n: np.take_along_axis(values, columns, axis=1) for n, values in texts.inputs.items()}
    return Batch(inputs, texts.labels)


def judged(shape: ModelShape, verdict: Verdict, recipe: Recipe) -> ModelShape:
    """Return the shape with the obstacle and the note of a verdict, if it has any."""
    notes, obstacle = shape.notes, shape.obstacle
    if verdict.testing is not None:
        notes += (
            f"evaluation.batch_size may change the results of evaluations: {verdict.testing}",
        )
    if _would_fuse(shape, recipe):
        head = [name.rpartition(".")[0] for name in shape.head]
        reasons = [verdict.layers.get(name) for name in (*shape.modules, *head)]
        reasons += [verdict.heads.get(name) for name in head]
        obstacle = next(filter(None, (verdict.training, *reasons)), None)
    return replace(shape, obstacle=obstacle, notes=notes)


def judged_without_weights(
    shape: ModelShape, config: Any, examples: Examples, recipe: Recipe
) -> ModelShape:
    """Return the result of `judged` for a planned run, predicted on random weights.

    `examples` are some of the data. Where the test is left to the run, the shape has a note that
    says so.

    Raises:
        ModelError: the model cannot compute an example.
    """
    if shape.total_params <= _MOST_RANDOM:
        return judged(shape, tried_on(recipe, config, None, examples), recipe)
    if not _would_fuse(shape, recipe):
        return shape
    note = (
        "whether clients computed together get the results of each alone is tested when the run"
        " starts: a plan does not build the model, it has"
        f" {shape.total_params:,} parameters"
    )
    return replace(shape, notes=(*shape.notes, note))


def tried_on(recipe: Recipe, config: Any, net: nn.Module | None, examples: Examples) -> Verdict:
    """Return the verdict on a model; None: with random weights.

    Raises:
        ModelError: the model cannot compute an example; names the values of `model.config` that it
            fails for.
    """

    def attempt(changed: Any) -> Verdict:
        if changed is config and net is not None:
            return examined(net, examples)
        return examined(_with_random_weights(recipe, changed), examples)

    return tried(recipe.model, config, attempt)


def _with_random_weights(recipe: Recipe, config: Any) -> nn.Module:
    """Return the model as its restored configuration gives it; a large one: ModelError."""
    random = recipe.model.model_copy(update={"source": "config"})
    own = base_models.restored(config.to_dict())
    size = sum(p.numel() for p in base_models.skeleton(random, own).parameters())
    if size > _MOST_RANDOM:
        raise ModelError(f"model.config: too large to try, {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        return base_weights.build(random, own, recipe.seed)


def _would_fuse(shape: ModelShape, recipe: Recipe) -> bool:
    return shape.obstacle is None and recipe.annealing.mode != "full"
