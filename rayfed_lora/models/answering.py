"""Greedy decoding of a loaded language model. Source: this project, on transformers' generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import GenerationConfig

from rayfed_lora.models.quiet import quiet


def greedy(
    net: nn.Module,
    prompts: Sequence[npt.NDArray[np.int32]],
    ends: Sequence[int],
    most: int,
    device: torch.device,
) -> list[npt.NDArray[np.int64]]:
    """Return the tokens that follow each prompt, up to the first that ends a text, left out.

    Args:
        net: transformers' causal language model, in evaluation mode.
        prompts: (n,) tokens of each; they are padded on the left, and computed together.
        ends: tokens that end a text.
        most: largest number of tokens.
        device: of the model.
    """
    length = max(map(len, prompts))
    ids = np.full((len(prompts), length), ends[0], np.int64)
    mask = np.zeros((len(prompts), length), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        use_cache=True,
    )
    model: Any = net
    with quiet():
        made = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            generation_config=settings,
        )
    found = made[:, length:].cpu().numpy()
    return [row[: _before(row, ends)] for row in found]


def _before(row: npt.NDArray[np.int64], ends: Sequence[int]) -> int:
    """Return the number of tokens before the first that ends a text."""
    places = np.flatnonzero(np.isin(row, ends))
    return int(places[0]) if len(places) else len(row)
