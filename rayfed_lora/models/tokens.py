"""Texts to arrays of tokens, as a model takes them. Source: transformers' tokenizers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.quiet import quiet

_Array = npt.NDArray[np.int32]
Tokens = dict[str, _Array]
# A tokenizer's results take up to about 200 bytes a character.
_BATCH_CHARACTERS = 2_000_000


def tokenize(tokenizer: Any, texts: list[str], max_length: int) -> Tokens:
    """Return n texts, truncated to `max_length` tokens and padded on the right to the longest.

    These are the tokenizer's outputs (`input_ids`, `attention_mask`, ...), each (n, length) int32.

    Raises:
        ModelError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token is None:
        raise ModelError(
            "model.tokenizer: expected one with a padding, an end or an unknown token, it has none"
        )
    rows: dict[str, list[_Array]] = defaultdict(list)
    with quiet():
        for batch in _batches(texts):
            encoded = tokenizer(
                batch, truncation=True, max_length=max_length, return_attention_mask=True
            )
            for name, values in encoded.items():
                rows[name] += [np.array(row, np.int32) for row in values]
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return {name: padded(values, fill.get(name, 0)) for name, values in rows.items()}


def tokenize_whole(tokenizer: Any, texts: list[str], max_length: int) -> Tokens:
    """Return n texts for a language model, each with the tokenizer's end token, if it has one.

    They are truncated to `max_length` tokens, which may drop the end token. `input_ids` and
    `attention_mask` are (n, length) int32; padding is 0, no padding token is needed.
    """
    rows = whole_texts(tokenizer, texts, max_length)
    masks = [np.ones_like(ids) for ids in rows]
    return {"input_ids": padded(rows, least=1), "attention_mask": padded(masks, least=1)}


def whole_texts(tokenizer: Any, texts: list[str], max_length: int) -> list[_Array]:
    """Return the tokens of each text as `tokenize_whole` does, (n,) int32, without padding."""
    end = tokenizer.eos_token_id
    rows: list[_Array] = []
    with quiet():
        for batch in _batches(texts):
            whole = tokenizer(batch)["input_ids"]
            ended = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in whole]
            rows += [np.array(ids[:max_length], np.int32) for ids in ended]
    return rows


def padded(
    rows: Sequence[npt.NDArray[np.integer[Any]]], fill: int = 0, *, least: int = 0
) -> _Array:
    """Return rows padded on the right to the longest of them, and to `least` values."""
    padded = np.full((len(rows), max([least, *map(len, rows)])), fill, np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


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
    """Replace all padding by the token `pad`, or 0; a text without tokens becomes that one token.

    `tokens` are `input_ids` and `attention_mask`, (n, length), and others, which stay.
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
    """Return the inputs that the model's forward pass takes; too many token types: ModelError."""
    parameters = inspect.signature(net.forward).parameters
    kept = {name: values for name, values in tokens.items() if name in parameters}
    types, known = kept.get("token_type_ids"), getattr(config, "type_vocab_size", None)
    if types is not None and isinstance(known, int) and known > 0 and types.max() >= known:
        raise ModelError(
            f"model.tokenizer: expected token types below {known} (type_vocab_size), got"
            f" {types.max()}"
        )
    return kept
