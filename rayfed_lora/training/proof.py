"""The proof that clients trained together get the results of each alone.

A run computes a few of its own examples with its own weights. A plan has neither tokens nor
weights: it draws both, for small models. Source: this project.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rayfed_lora.data.examples import PIXELS, Batch, Examples
from rayfed_lora.data.tables import IMAGE_TASK
from rayfed_lora.errors import ModelError
from rayfed_lora.models import loading, sources
from rayfed_lora.models.mixing import Trial, Verdict, tried
from rayfed_lora.models.tracing import image_shape
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.drawing import tensors
from rayfed_lora.types import ModelShape

# Examples that are compared: the shortest, the longest and one between.
_EXAMPLES = 3
# Tokens of the longest of them, and how many a text keeps at least.
_LONGEST, _SHORTEST = 64, 8
# What BigBird's kind calls attention of which the pattern depends on the length.
_BLOCKS = "block_sparse"
# Values of a model that a plan draws in half a second.
_MOST_DRAWN = 30_000_000
_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


def examined(net: nn.Module, examples: Examples) -> Verdict:
    """Return what a few examples show of a model.

    Long texts are cut, each by the same share and to its first tokens and its last one, but for
    models that attend to blocks of tokens: those switch to full attention for short texts. All of
    it is computed on the CPU in float32, whatever the run computes with.

    Args:
        net: the plain model on the CPU, with its source's weights.
        examples: of the training split.

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
        few = _cut(few, lengths[rows])
    chosen = Examples.of(few.inputs, few.labels)
    alone = [tensors(chosen.rows(np.array([i])))[0] for i in range(len(rows))]
    try:
        return tried(net, Trial(tensors(few)[0], alone))
    except Exception as error:  # a model may raise anything
        raise ModelError(
            f"model: {type(net).__name__} cannot compute an example of the data:"
            f" {sources.message(error).rstrip('.')}; check model.tokenizer and the data"
        ) from error


def _cut(texts: Batch, lengths: npt.NDArray[np.int64]) -> Batch:
    """Return texts of at most `_LONGEST` tokens; which of two is the longer one stays so."""
    longest = int(lengths.max())
    if longest <= _LONGEST:
        return texts
    kept = np.maximum(lengths * _LONGEST // longest, np.minimum(lengths, _SHORTEST))
    # The first ones, the last one, and padding behind it.
    places = np.minimum(np.arange(_LONGEST), kept[:, None] - 1)
    places = np.where(places == kept[:, None] - 1, lengths[:, None] - 1, places)
    behind = np.arange(_LONGEST) >= kept[:, None]
    places = np.where(behind, np.minimum(lengths[:, None], longest - 1), places)
    inputs = {n: np.take_along_axis(values, places, axis=1) for n, values in texts.inputs.items()}
    return Batch(inputs, texts.labels)


def judged(shape: ModelShape, verdict: Verdict, recipe: Recipe) -> ModelShape:
    """Return the shape with the obstacle of a verdict, if it has any.

    Where clients are not computed together anyhow, batches of an evaluation still are: then it is
    a note.

    Args:
        shape: of the model.
        verdict: from `examined`.
        recipe: the run.
    """
    notes, obstacle = shape.notes, shape.obstacle
    if verdict.testing is not None:
        notes += (
            f"evaluation.batch_size may change the results of evaluations: {verdict.testing}",
        )
    if _in_question(shape, recipe):
        head = [name.rpartition(".")[0] for name in shape.head]
        reasons = [verdict.layers.get(name) for name in (*shape.modules, *head)]
        reasons += [verdict.heads.get(name) for name in head]
        obstacle = next(filter(None, (verdict.training, *reasons)), None)
    return replace(shape, obstacle=obstacle, notes=notes)


def foreseen(config: Any, shape: ModelShape, recipe: Recipe) -> ModelShape:
    """Return the shape with the obstacle that drawn examples show on drawn weights.

    Args:
        config: of the model.
        shape: of the model.
        recipe: the run that is planned.
    """
    why = f"it has {shape.total_params:,} values"
    if shape.total_params <= _MOST_DRAWN:
        drawn, config = recipe.model.model_copy(update={"source": "config"}), copy.deepcopy(config)
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", None) is None:
                # A run takes the tokenizer's.
                part.pad_token_id = 0
        with torch.random.fork_rng(devices=[]):
            net, _ = loading.built(drawn, config, recipe.seed)
        try:
            return judged(shape, examined(net, _drawn(config, recipe)), recipe)
        except ModelError as error:  # drawn tokens may be no text that the model accepts
            why = f"it takes no text of drawn tokens ({type(error.__cause__).__name__})"
    if not _in_question(shape, recipe):
        return shape
    note = (
        "whether clients computed together get the results of each alone is tried when the run"
        f" starts: a plan does not draw the model, {why}"
    )
    return replace(shape, notes=(*shape.notes, note))


def _in_question(shape: ModelShape, recipe: Recipe) -> bool:
    """Return whether clients would be trained together."""
    return shape.obstacle is None and recipe.annealing.mode != "full"


def _drawn(config: Any, recipe: Recipe) -> Examples:
    """Return examples of different lengths that no tokenizer has made."""
    rng, labels = np.random.default_rng(recipe.seed), np.zeros(_EXAMPLES, np.int64)
    if recipe.model.task == IMAGE_TASK:
        shape = (_EXAMPLES, *image_shape(config))
        return Examples.of({PIXELS: rng.normal(size=shape).astype(np.float32)}, labels)
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    longest = max(min(recipe.data.max_length, positions - 2, _LONGEST), 2)
    lengths = np.linspace(2, longest, _EXAMPLES).astype(np.int64)
    special = {getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
    words = [i for i in range(min(config.vocab_size, 1000)) if i not in special] or [0]
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int32)
    ids = np.where(mask == 1, rng.choice(words, mask.shape), config.pad_token_id or 0)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):
        ids[np.arange(_EXAMPLES), lengths - 1] = end
    return Examples.of({"input_ids": ids.astype(np.int32), "attention_mask": mask}, labels)
