"""The test that clients trained in one batch get the results that each would get alone.

A run tests a few of its examples with its weights. A plan has neither: it uses random examples and
random weights, for small models only.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rayfed_lora.data.columns import IMAGE_TASK
from rayfed_lora.data.examples import PIXELS, Batch, Examples
from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_weights
from rayfed_lora.models.mixing import Verdict, verdict_on
from rayfed_lora.models.shapes import image_shape
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
_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


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


def judged_without_weights(shape: ModelShape, config: Any, recipe: Recipe) -> ModelShape:
    """Return the result of `judged` for a planned run, predicted on random weights and examples.

    Where the test is left to the run, the shape has a note that says so.
    """
    reason = f"it has {shape.total_params:,} parameters"
    if shape.total_params <= _MOST_RANDOM:
        random, config = recipe.model.model_copy(update={"source": "config"}), copy.deepcopy(config)
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", None) is None:
                # A run uses the tokenizer's.
                part.pad_token_id = 0
        with torch.random.fork_rng(devices=[]):
            net = base_weights.build(random, config, recipe.seed)
        try:
            return judged(shape, examined(net, _random_examples(config, recipe)), recipe)
        except ModelError as error:  # random tokens may be no text that the model accepts
            reason = f"it rejects texts of random tokens ({type(error.__cause__).__name__})"
    if not _would_fuse(shape, recipe):
        return shape
    note = (
        "whether clients computed together get the results of each alone is tested when the run"
        f" starts: a plan does not build the model, {reason}"
    )
    return replace(shape, notes=(*shape.notes, note))


def _would_fuse(shape: ModelShape, recipe: Recipe) -> bool:
    return shape.obstacle is None and recipe.annealing.mode != "full"


def _random_examples(config: Any, recipe: Recipe) -> Examples:
    """Return random examples; texts have different lengths."""
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
