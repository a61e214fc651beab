"""Texts to arrays of tokens, as a model takes them. Source: transformers' tokenizers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.sources import quiet

Tokens = dict[str, npt.NDArray[np.int32]]
# A tokenizer's results take up to some 200 bytes a character.
_BATCH_CHARACTERS = 2_000_000


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> Tokens:
    """Return the tokenised texts, padded on the right to the longest of them.

    Args:
        tokenizer: a transformers tokenizer.
        texts: n texts.
        max_length: maximum tokens of a text; longer texts are truncated.

    Returns:
        The tokenizer's own outputs (`input_ids`, `attention_mask`, ...), each (n, length) int32.

    Raises:
        ModelError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token is None:
        raise ModelError(
            "model.tokenizer: expected one with a padding, an end or an unknown token, it has none"
        )
    parts: list[Tokens] = []
    with quiet():
        for batch in _batches(texts):
            encoded = tokenizer(
                batch,
                truncation=True,
                max_length=max_length,
                padding="longest",
                padding_side="right",
                return_attention_mask=True,
                return_tensors="np",
            )
            parts.append({n: np.asarray(values, dtype=np.int32) for n, values in encoded.items()})
    longest = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}

    def padded(name: str, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        behind = ((0, 0), (0, longest - rows.shape[1]))
        return np.pad(rows, behind, constant_values=fill.get(name, 0))

    return {name: np.concatenate([padded(name, part[name]) for part in parts]) for name in parts[0]}


def tokenize_whole(tokenizer: Any, texts: list[str], max_length: int) -> Tokens:
    """Return texts for a language model: each ends in the tokenizer's end token, unless truncated.

    Args:
        tokenizer: a transformers tokenizer; it needs no padding token.
        texts: n texts.
        max_length: maximum tokens of a text, its end included; longer texts are truncated.

    Returns:
        `input_ids` and `attention_mask`, each (n, length) int32; padding is 0.
    """
    end = tokenizer.eos_token_id
    rows: list[list[int]] = []
    with quiet():
        for batch in _batches(texts):
            whole = tokenizer(batch)["input_ids"]
            ended = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in whole]
            rows += [ids[:max_length] for ids in ended]
    length = max(1, *(len(ids) for ids in rows))
    tokens, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    return {"input_ids": tokens, "attention_mask": mask}


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Cut texts into batches of limited size: a tokenizer returns truncated tokens as well."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and characters + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    yield batch


def pad_with(tokens: Tokens, pad: int | None) -> Tokens:
    """Replace all padding by one token; a text without tokens becomes that one token.

    Args:
        tokens: `input_ids` and `attention_mask`, (n, length), and others.
        pad: the padding token; None: 0.

    Returns:
        The same inputs, whose padding does not depend on the tokenizer.
    """
    if tokens["input_ids"].shape[1] == 0:
        # No text has a token.
        tokens = {name: np.zeros((len(ids), 1), np.int32) for name, ids in tokens.items()}
    mask = tokens["attention_mask"].copy()
    mask[mask.sum(axis=1) == 0, 0] = 1
    padding = tokens["attention_mask"] == 0
    ids = np.where(padding, np.int32(0 if pad is None else pad), tokens["input_ids"])
    return {**tokens, "input_ids": ids, "attention_mask": mask}


def known_inputs(net: nn.Module, config: Any, tokens: Tokens) -> Tokens:
    """Return the inputs that the model's forward pass takes.

    Raises:
        ModelError: the texts have more token types than the model.
    """
    parameters = inspect.signature(net.forward).parameters
    kept = {name: values for name, values in tokens.items() if name in parameters}
    types, known = kept.get("token_type_ids"), getattr(config, "type_vocab_size", None)
    if types is not None and isinstance(known, int) and known > 0 and types.max() >= known:
        raise ModelError(
            f"model.tokenizer: expected token types below {known} (type_vocab_size), got"
            f" {types.max()}"
        )
    return kept
