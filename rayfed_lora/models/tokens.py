"""Texts to token arrays. Source: this project, on transformers' tokenizers."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.models.padding import POSITIONS, Tokens
from rayfed_lora.models.sources import quiet
from rayfed_lora.recipe import Model


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> Tokens:
    """Return the tokenised texts, padded on the right to the longest of them.

    Args:
        tokenizer: a transformers tokenizer.
        texts: n texts.
        max_length: longest text in tokens; the rest is cut.

    Returns:
        The tokenizer's own outputs (`input_ids`, `attention_mask`, ...), each (n, length) int32.

    Raises:
        ModelError: the tokenizer has no padding token, and none to take for it.
    """
    if tokenizer.pad_token is None:
        raise ModelError(
            "model.tokenizer: expected one with a padding, an end or an unknown token, it has none"
        )
    with quiet():
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            padding="longest",
            padding_side="right",
            return_attention_mask=True,
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
        `input_ids` and `attention_mask`, each (n, length) int32; 0 stands in padding.
    """
    with quiet():
        whole = tokenizer(texts)["input_ids"]
    end = tokenizer.eos_token_id
    rows = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in whole]
    rows = [ids[:max_length] for ids in rows]
    length = max(1, *(len(ids) for ids in rows))
    tokens, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    return {"input_ids": tokens, "attention_mask": mask}


# What RoBERTa's kind keeps of the positions that its configuration names is a little less.
_SPARE = 8


def check_length(model: Model, config: Any, longest: int) -> None:
    """Refuse texts that are longer than the table of positions of a model that has one.

    Args:
        model: the recipe's section.
        config: from `sources.configuration`.
        longest: tokens of the longest text.

    Raises:
        ModelError: there are fewer positions.
    """
    named = getattr(config, "max_position_embeddings", None)
    if not isinstance(named, int) or longest <= named - _SPARE:
        return
    for name, module in sources.skeleton(model, config).named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(POSITIONS):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            if longest > module.num_embeddings - first:
                raise ModelError(
                    f"data.max_length: expected at most {module.num_embeddings - first}, the"
                    f" positions of the model, the longest text has {longest} tokens"
                )
