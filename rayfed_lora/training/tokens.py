"""The loss of causal language models, text by text.

Source: cross entropy of the next token, as transformers' causal models compute it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional


def token_losses(
    logits: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how a language model foretells each token of a text but the first.

    Args:
        logits: (texts, length, vocabulary).
        inputs: with `input_ids` and `attention_mask`, (texts, length).

    Returns:
        Three times (texts,): sum of cross entropies, number of tokens, how many were the likeliest.
    """
    targets, known = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:] > 0
    before = logits[:, :-1]
    each = functional.cross_entropy(before.transpose(1, 2), targets, reduction="none")
    right = (before.argmax(dim=2) == targets) & known
    return (each * known).sum(dim=1), known.sum(dim=1), right.sum(dim=1)
