"""The weights of a run's base model, made once and shared by its trainers. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from torch import nn

from rayfed_lora.data.workload import Workload
from rayfed_lora.models import base_models, base_weights
from rayfed_lora.models.mixing import Verdict
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.proof import tried_on


@dataclass(frozen=True)
class Weights:
    """A base model, the same for all trainers of a run; depends on data and model only.

    Attributes:
        arrays: the weights of the source, by parameter and buffer name.
        verdict: whether the model computes examples together as it does alone.
        random: names of the tensors that are not the source's, but drawn.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    verdict: Verdict
    random: frozenset[str]


def built_weights(recipe: Recipe, workload: Workload) -> Weights:
    """Read or draw the weights of the source, and try them on a few examples.

    Args:
        recipe: the run; `runtime.device` cuda: for actors with a GPU.
        workload: from `prepare`.

    Raises:
        ModelError: they cannot be read, the model cannot compute an example, or the adapter does
            not fit it.
    """
    config = base_models.restored(workload.config)
    # Faults of the adapter are found before the weights are read.
    shape = model_shape(base_models.skeleton(recipe.model, config), recipe)
    net, random = _kept(recipe, config, shape.head)
    verdict = tried_on(recipe, config, net, workload.train)
    return Weights(base_weights.arrays_of(net), verdict, random)


def _kept(recipe: Recipe, config: Any, trained: Sequence[str]) -> tuple[nn.Module, frozenset[str]]:
    dtype = base_weights.kept_dtype(recipe.model, on_gpu=recipe.runtime.device == "cuda")
    return base_weights.build_kept(recipe.model, config, recipe.seed, dtype, trained)


def assembled(recipe: Recipe, workload: Workload, weights: Weights) -> nn.Module:
    """Return the plain model on the shared arrays, or another one where that cannot be.

    Its parameters may be read-only.
    """
    config = base_models.restored(workload.config)
    net = base_weights.assembled(recipe.model, config, weights.arrays)
    if net is not None:
        return net
    head = model_shape(base_models.skeleton(recipe.model, config), recipe).head
    return _kept(recipe, config, head)[0]
