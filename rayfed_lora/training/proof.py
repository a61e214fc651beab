"""The proof that clients trained together get the results of each alone.

A run computes a few of its own examples with its own weights. A plan has neither tokens nor
weights: it draws both, for small models. Source: this project.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rayfed_lora.data.examples import PIXELS, Examples
from rayfed_lora.data.tables import IMAGE_TASK
from rayfed_lora.models import loading
from rayfed_lora.models.mixing import Trial, mixing_obstacle
from rayfed_lora.models.tracing import image_shape
from rayfed_lora.recipe import Recipe
from rayfed_lora.training.drawing import tensors
from rayfed_lora.types import ModelShape

# Examples that are compared: the shortest, the longest and one between.
_EXAMPLES = 3
# Values of a model that a plan draws in half a second, and tokens of its texts.
_MOST_DRAWN, _LONGEST_DRAWN = 30_000_000, 64
_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


def proven(net: nn.Module, shape: ModelShape, recipe: Recipe, examples: Examples) -> ModelShape:
    """Return the shape with the obstacle that a few examples show, if they show any.

    Where clients are not computed together anyhow, batches of an evaluation still are: then it is
    a note.

    The proof is that of the CPU in float32, whatever the run computes with: all actors of a run
    come to the same result. It takes as long as a small part of one client's step.

    Args:
        net: the plain model on the CPU, with its source's weights.
        shape: of the model.
        recipe: the run.
        examples: of the training split.
    """
    if len(examples) < 2:
        return shape
    mask = examples.inputs.get("attention_mask")
    lengths = np.zeros(len(examples)) if mask is None else mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    rows = order[np.unique(np.linspace(0, len(order) - 1, _EXAMPLES).astype(np.int64))]
    alone = [tensors(examples.rows(rows[i : i + 1]))[0] for i in range(len(rows))]
    trial = Trial(tensors(examples.rows(rows))[0], alone)
    fuses = _in_question(shape, recipe)
    if fuses:
        head = [*dict.fromkeys(name.rpartition(".")[0] for name in shape.head)]
        trial = replace(trial, layers=[*shape.modules, *head], head=head)
    found = mixing_obstacle(net, trial, training=fuses)
    if found is None:
        return shape
    note = f"evaluation.batch_size may change the results of evaluations: {found}"
    notes = (*shape.notes, note) if "mixes" in found else shape.notes
    return replace(shape, obstacle=found if fuses else shape.obstacle, notes=notes)


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
        if getattr(config, "pad_token_id", None) is None:
            # A run takes the tokenizer's.
            config.pad_token_id = 0
        with torch.random.fork_rng(devices=[]):
            net, _ = loading.built(drawn, config, recipe.seed)
        try:
            examples = _drawn(config, recipe)
            with torch.no_grad():
                net.eval()(**tensors(examples.rows(np.arange(1)))[0])
            return proven(net, shape, recipe, examples)
        except Exception as error:  # drawn tokens may be no text that the model accepts
            why = f"it takes no text of drawn tokens ({type(error).__name__})"
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
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST_DRAWN
    longest = max(min(recipe.data.max_length, positions - 2, _LONGEST_DRAWN), 2)
    lengths = np.linspace(2, longest, _EXAMPLES).astype(np.int64)
    special = {getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
    words = [i for i in range(min(config.vocab_size, 1000)) if i not in special] or [0]
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int32)
    ids = np.where(mask == 1, rng.choice(words, mask.shape), config.pad_token_id or 0)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):
        ids[np.arange(_EXAMPLES), lengths - 1] = end
    return Examples.of({"input_ids": ids.astype(np.int32), "attention_mask": mask}, labels)
