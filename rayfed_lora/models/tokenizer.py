"""Padding token, vocabulary and positions of a tokenizer and a model. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoTokenizer

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.tokens import Tokens
from rayfed_lora.recipe.model import Model

# Characters of a text shown in a message.
_SHOWN = 60
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")


def read_tokenizer(model: Model) -> Any:
    """Return the tokenizer of a model.

    Raises:
        ModelError: the source has none, or the tokenizer cannot be read.
    """
    source = model.tokenizer or model.source
    if source == "config":
        raise ModelError(
            "model.tokenizer: expected a package, folder or hub id, since model.source 'config'"
            " has no tokenizer of its own"
        )
    with base_models.attributed(f"tokenizer of {source!r}"):
        return AutoTokenizer.from_pretrained(base_models.location(source), trust_remote_code=False)


def give_padding_token(tokenizer: Any) -> str | None:
    """Let a tokenizer without a padding token pad with its end token, or the unknown one.

    Returns:
        The new padding token; None where the tokenizer had one, or has no other to use.
    """
    token: str | None = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is not None or token is None:
        return None
    tokenizer.pad_token = token
    return token


def write_tokenizer(folder: Path, model: Model, chat_template: str | None = None) -> None:
    """Write the tokenizer of a model, with its chat template or another, as used in training.

    Raises:
        ModelError: it cannot be read.
    """
    tokenizer = read_tokenizer(model)
    if model.task == "text-classification":
        give_padding_token(tokenizer)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with quiet():
        tokenizer.save_pretrained(str(folder))


def token_facts(tokenizer: Any, *, padding: bool) -> dict[str, Any]:
    """Return the configuration entries that a model with random weights takes from its tokenizer.

    With `padding`, they include the padding token, whose embedding is then all zeros.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    names = ["bos_token_id", "eos_token_id", *(["pad_token_id"] if padding else [])]
    facts = {name: getattr(tokenizer, name) for name in names}
    facts["vocab_size"] = max(len(tokenizer), largest + 1)
    return {name: value for name, value in facts.items() if value is not None}


def settle_padding(config: Any, net: nn.Module, tokenizer: Any, model: Model) -> None:
    """Set the padding token of a model's configuration, in place, to the tokenizer's.

    A decoder's classifier reads the last token that is not `config.pad_token_id`. Where positions
    are counted from that token (RoBERTa's kind) the pre-trained value stays, since another value
    would shift every position. A value in the recipe stays, too.
    """
    text = config.get_text_config()
    tables = [] if model.source == "config" else _position_tables(net)
    counted = any(table.padding_idx is not None for table in tables)
    if "pad_token_id" in model.config or (counted and text.pad_token_id is not None):
        return
    if tokenizer.pad_token_id is not None:
        text.pad_token_id = config.pad_token_id = tokenizer.pad_token_id


def padding_notes(net: nn.Module) -> tuple[str, ...]:
    """Return a note for the user where a classifier reads padding (XLNet's kind)."""
    summary: Any = getattr(net, "sequence_summary", None)
    kind = getattr(summary, "summary_type", None)
    if kind not in ("last", "mean"):
        return ()
    return (
        f"{type(net).__name__} reads padding too (summary_type {kind!r}): a result depends on which"
        " texts share a batch; model.config.summary_type: first reads the first token alone",
    )


def check_vocabulary(net: nn.Module, tokenizer: Any, config: Any | None) -> None:
    """Raise ModelError if a word, or the configured padding token, has no embedding.

    Tokens that were added to a tokenizer (for images, for unused roles) may have none:
    `check_tokens` rejects texts in which they occur.
    """
    rows = _embeddings(net)
    if rows is None:
        return
    added = tokenizer.added_tokens_decoder
    words = [token for token in tokenizer.get_vocab().values() if token not in added]
    largest = max(words, default=0)
    if largest >= rows:
        raise ModelError(
            f"model.tokenizer: expected tokens below {rows}, the embeddings of the model, its"
            f" largest is {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}); use the"
            " model's own tokenizer, or a model whose embeddings were resized for this one"
        )
    pad = None if config is None else config.get_text_config().pad_token_id
    if pad is not None and not 0 <= pad < rows:
        raise ModelError(
            f"model.config.pad_token_id: expected a token below {rows}, the embeddings of the"
            f" model, got {pad}"
        )


def check_tokens(net: nn.Module, tokenizer: Any, tokens: Tokens, texts: Sequence[str]) -> None:
    """Raise ModelError, with the token and the text, if a token has no embedding."""
    rows, ids = _embeddings(net), tokens["input_ids"]
    if rows is None or ids.size == 0 or ids.max() < rows:
        return
    row, place = map(int, np.unravel_index(ids.argmax(), ids.shape))
    token = int(ids[row, place])
    raise ModelError(
        f"model.tokenizer: expected tokens below {rows}, the embeddings of the model, got {token}"
        f" ({tokenizer.convert_ids_to_tokens(token)!r}) in the text {texts[row][:_SHOWN]!r}; remove"
        " it from the texts, use the model's own tokenizer, or a model whose embeddings were"
        " resized for this one"
    )


def check_length(net: nn.Module, config: Any, longest: int) -> None:
    """Raise ModelError if the model has a table of fewer positions than `longest` tokens."""
    positions = _positions(net, config)
    if positions is not None and longest > positions:
        raise ModelError(
            f"data.max_length: expected at most {positions}, the positions of the model, the"
            f" longest text has {longest} tokens"
        )


def may_exceed(net: nn.Module, config: Any, tokenizer: Any, max_length: int) -> bool:
    """Return whether texts may have more tokens, or larger ones, than the model has embeddings."""
    positions, rows = _positions(net, config), _embeddings(net)
    largest = max(tokenizer.get_vocab().values(), default=0)
    return (positions is not None and max_length > positions) or (
        rows is not None and largest >= rows
    )


def _positions(net: nn.Module, config: Any) -> int | None:
    """Return the number of tokens that have a position; None where it is not limited."""
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        return None
    tables = _position_tables(net)
    unused = [0 if t.padding_idx is None else t.padding_idx + 1 for t in tables]
    return min((t.num_embeddings - n for t, n in zip(tables, unused, strict=True)), default=None)


def _embeddings(net: nn.Module) -> int | None:
    """Return the number of tokens with an embedding; None where it is unknown."""
    try:
        table: Any = net.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _position_tables(net: nn.Module) -> list[nn.Embedding]:
    named = [module for name, module in net.named_modules() if name.endswith(_POSITIONS)]
    return [module for module in named if isinstance(module, nn.Embedding)]
