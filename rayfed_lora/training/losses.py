"""The loss of a causal language model by text.

Source: cross entropy of the next token, as transformers' causal models compute it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional


def token_losses(
    logits: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how well a language model predicts the tokens of each text, from the second on.

    Args:
        logits: (texts, length, vocabulary).
        inputs: with `input_ids` and `attention_mask`, (texts, length).

    Returns:
        Three tensors (texts,): sum of cross entropies, number of tokens, and number of tokens to
        which the model gives the highest logit.
    """
    targets, present = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:] > 0
    predictions = logits[:, :-1]
    losses = functional.cross_entropy(predictions.transpose(1, 2), targets, reduction="none")
    right = (predictions.argmax(dim=2) == targets) & present
    return (losses * present).sum(dim=1), present.sum(dim=1), right.sum(dim=1)
