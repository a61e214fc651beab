"""Texts to token arrays. Source: this project, on transformers' tokenizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.models.sources import quiet


def tokenize(
    tokenizer: Any, texts: list[str], max_length: int, *, ends: bool = False
) -> dict[str, npt.NDArray[np.int32]]:
    """Return the tokenised texts, padded on the right to the longest of them.

    Args:
        tokenizer: a transformers tokenizer.
        texts: n texts.
        max_length: longest text in tokens; the rest is cut.
        ends: whether a text that is not cut ends in the token that says so, where there is one.

    Returns:
        The tokenizer's own outputs (`input_ids`, `attention_mask`, ...), each (n, length) int32.
    """
    end = tokenizer.eos_token
    if ends and end is not None:
        texts = [text + end for text in texts]
    if tokenizer.pad_token is None:
        # Padding is masked: what stands there does not matter.
        tokenizer.pad_token = end or tokenizer.unk_token
    with quiet():
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            padding="longest",
            padding_side="right",
            return_tensors="np",
        )
    return {name: np.asarray(values, dtype=np.int32) for name, values in encoded.items()}
