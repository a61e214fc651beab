"""Texts to token arrays. Source: this project, on transformers' tokenizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.errors import ModelError
from rayfed_lora.models.sources import quiet

Tokens = dict[str, npt.NDArray[np.int32]]


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> Tokens:
    """Return the tokenised texts, padded on the right to the longest of them.

    Args:
        tokenizer: a transformers tokenizer.
        texts: n texts.
        max_length: longest text in tokens; the rest is cut.

    Returns:
        The tokenizer's own outputs (`input_ids`, `attention_mask`, ...), each (n, length) int32.

    Raises:
        ModelError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token is None:
        raise ModelError("model.tokenizer: expected one with a padding token, it has none")
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


def tokenize_whole(tokenizer: Any, texts: list[str], max_length: int) -> Tokens:
    """Return texts to be continued: what is not cut ends in the tokenizer's end token, if any.

    Args:
        tokenizer: a transformers tokenizer; it needs no padding token.
        texts: n texts.
        max_length: longest text in tokens, its end included; the rest is cut.

    Returns:
        `input_ids` and `attention_mask`, each (n, length) int32.
    """
    with quiet():
        whole = tokenizer(texts)["input_ids"]
    end = tokenizer.eos_token_id
    rows = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in whole]
    rows = [ids[:max_length] for ids in rows]
    length = max(1, *(len(ids) for ids in rows))
    # Padding is masked: what stands there does not matter.
    tokens, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    return {"input_ids": tokens, "attention_mask": mask}
