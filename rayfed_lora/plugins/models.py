"""Own models: functions that build an `nn.Module`. Source: this project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayfed_lora.plugins.tables import MODELS


def model(name: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Register a model for images: a function of (channels, height, width, classes).

    It returns a `torch.nn.Module` that computes (batch, classes) logits of (batch, channels,
    height, width) pixels. It is called under the run's seed, and on torch's meta device, too.
    Images need not be square: rows of n numbers are images of 1 x n floats. Keyword-only parameters
    are its options: keys of the recipe's section `model`. Names of modules in recipes begin with
    `net.`; the head is the last linear layer with an output for each class, if there is one.

    Args:
        name: value of `model.source`; default: the function's, with hyphens.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """
    return lambda function: MODELS.add(function, name)
