"""One batch of each kind through a model, before anything starts.

The model is on torch's meta device: its layers check the sizes of what they get, and compute no
value. Faults that only values show are found by `training.proof`. Source: this project.
"""

from __future__ import annotations

import re
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rayfed_lora.data.client_numbers import ClientSettings
from rayfed_lora.data.columns import LANGUAGE_TASK
from rayfed_lora.data.examples import Examples
from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.causes import tried
from rayfed_lora.models.language import model_inputs
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.shapes import no_padding_warning
from rayfed_lora.models.wording import one_line, where
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.drawing import tensors
from rayfed_lora.types import DeviceFacts

# Examples of the largest batch that is computed: more of them change nothing.
_MOST_EXAMPLES = 8
# Errors of a model that reads values of tensors, which do not exist on the meta device.
_READS_VALUES = re.compile(r"\bmeta\b|data-dependent")
# What torch's batch normalisation raises.
_ALONE = "Expected more than 1 value per channel"


def rehearse(recipe: Recipe, config: Any, examples: Examples, devices: DeviceFacts) -> nn.Module:
    """Compute batches as in training and testing, and write the configuration as an export does.

    Args:
        recipe: the run.
        config: of the model.
        examples: some of the data, the longest text among them.
        devices: numbers of the clients' examples, and what settings of theirs follow from.

    Returns:
        The model, on the meta device.

    Raises:
        ModelError: the model cannot compute a batch, or its configuration cannot be written.
    """
    settings = ClientSettings.of(recipe, devices)
    smallest, largest = batch_sizes(devices.sizes, settings)
    kinds = {(min(largest, _MOST_EXAMPLES), True), (smallest, True)}
    kinds.add((min(recipe.evaluation.batch_size, _MOST_EXAMPLES), False))

    def attempt(changed: Any) -> nn.Module:
        with base_models.attributed(where(recipe.model)):
            own = base_models.restored(changed.to_dict())
        net = base_models.skeleton(recipe.model, own)
        for rows, training in sorted(kinds, reverse=True):
            for inputs in _batches(examples, rows):
                _compute(net, recipe, inputs, training=training)
        _write(net, where(recipe.model))
        return net.eval()

    return tried(recipe.model, config, attempt)


def batch_sizes(counts: npt.NDArray[np.int64], settings: ClientSettings) -> tuple[int, int]:
    """Return the sizes of the smallest and the largest micro-batch of any client in training.

    >>> batch_sizes(np.array([5, 8, 0]), ClientSettings(0.1, steps=None, batch_size=4))
    (1, 4)
    >>> batch_sizes(np.array([5, 8, 0]), ClientSettings(0.1, steps=1, batch_size=4))
    (4, 4)
    >>> batch_sizes(np.array([5, 8, 0]), ClientSettings(0.1, 1, 4, accumulate=2))
    (1, 4)
    """
    held = counts[counts > 0]
    step = np.broadcast_to(settings.step_examples, counts.shape)[counts > 0]
    batches = [np.minimum(held, step)]
    if settings.steps is None:
        # The last one of an epoch.
        batches.append((held - 1) % step + 1)
    most = settings.most_examples
    smallest = min(int(((each - 1) % most + 1).min()) for each in batches)
    return smallest, int(np.minimum(batches[0], most).max())


def _batches(examples: Examples, rows: int) -> list[dict[str, torch.Tensor]]:
    """Return batches on the meta device: of the longest texts, and of one token fewer."""
    inputs, _ = tensors(examples.rows(np.zeros(1, np.int64)))
    mask = examples.inputs.get("attention_mask")
    lengths: list[tuple[int, ...]] = [()]
    if mask is not None:
        used = mask.sum(axis=1)
        shorter = max(int(used.max()) - 1, int(used.min()), 1)
        lengths = [(length,) for length in {max(int(used.max()), 1), shorter}]
    return [
        {
            name: each.to("meta").new_empty((rows, *length, *each.shape[1 + len(length) :]))
            for name, each in inputs.items()
        }
        for length in lengths
    ]


def _compute(
    net: nn.Module, recipe: Recipe, inputs: dict[str, torch.Tensor], *, training: bool
) -> None:
    """Compute a batch; a model that reads values is left to `training.proof`."""
    name, first = type(net).__name__, next(iter(inputs.values()))
    try:
        with torch.no_grad(), quiet(), no_padding_warning(net):
            logits = net.train(training)(**model_inputs(inputs)).logits
    except Exception as error:  # of many types
        if isinstance(error, NotImplementedError) or _READS_VALUES.search(str(error)):
            return
        if _ALONE in str(error) and len(first) == 1:
            raise ModelError(
                f"clients.batch_size: expected training batches of two examples or more, since"
                f" {name} normalises over a batch, got one of a single example; choose a"
                " batch_size that leaves no last batch of one, local_steps instead of"
                " local_epochs, or a higher data.partition.min_examples"
            ) from error
        use, count = "training" if training else "a test", len(first)
        raise ModelError(
            f"{where(recipe.model)}: {name} cannot compute a batch of {count} of the data in {use}:"
            f" {one_line(error)}"
        ) from error
    expected = first.shape[:2] if recipe.model.task == LANGUAGE_TASK else first.shape[:1]
    if logits.shape[:-1] != expected:
        raise ModelError(
            f"{where(recipe.model)}: expected a vector of logits for each example or token,"
            f" ({', '.join(map(str, expected))}, classes), {name} gives {tuple(logits.shape)}"
        )


def _write(net: Any, subject: str) -> None:
    """Write the configuration where an export would."""
    with base_models.attributed(subject), TemporaryDirectory() as folder:
        net.config.save_pretrained(folder)
        if net.can_generate():
            net.generation_config.save_pretrained(folder)
