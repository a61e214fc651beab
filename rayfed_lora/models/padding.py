"""Which token pads a text, and whether a model knows all tokens of a tokenizer.

Source: this project.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.recipe.model import Model

Tokens = dict[str, npt.NDArray[np.int32]]
# Characters of a text that a message shows.
_SHOWN = 60
POSITIONS = ("position_embeddings", "embed_positions", "wpe")


def give_padding_token(tokenizer: Any) -> str | None:
    """Let a tokenizer without a padding token pad with its end token, or the unknown one.

    Args:
        tokenizer: a transformers tokenizer, changed in place.

    Returns:
        The token it pads with from now on; None where it had one, or has none to take.
    """
    if tokenizer.pad_token is not None:
        return None
    taken = tokenizer.eos_token or tokenizer.unk_token
    if taken is not None:
        tokenizer.pad_token = taken
    return taken  # type: ignore[no-any-return]


def token_facts(tokenizer: Any, *, padding: bool) -> dict[str, Any]:
    """Return what a tokenizer says of the configuration of a model with random weights.

    Args:
        tokenizer: a transformers tokenizer.
        padding: whether the model gets the padding token too: its embedding is then all zeros.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    facts = {"vocab_size": max(len(tokenizer), largest + 1)}
    for name in ("bos_token_id", "eos_token_id", *(["pad_token_id"] if padding else [])):
        if getattr(tokenizer, name) is not None:
            facts[name] = getattr(tokenizer, name)
    return facts


def settle_padding(config: Any, net: nn.Module, tokenizer: Any, model: Model) -> None:
    """Set the configuration's padding token to the tokenizer's.

    A decoder's classifier reads the last token that is not `config.pad_token_id`. Where positions
    are counted from that token (RoBERTa's kind) the pre-trained value stays: another one would
    shift every position. A value in the recipe stays, too.

    Args:
        config: of the model, changed in place.
        net: the model, real or on the meta device.
        tokenizer: a transformers tokenizer.
        model: the recipe's section.
    """
    text = config.get_text_config()
    counted = model.source != "config" and any(
        isinstance(module, nn.Embedding)
        and name.endswith(POSITIONS)
        and module.padding_idx is not None
        for name, module in net.named_modules()
    )
    if "pad_token_id" in model.config or (counted and text.pad_token_id is not None):
        return
    if tokenizer.pad_token_id is not None:
        text.pad_token_id = tokenizer.pad_token_id
        if text is not config:
            config.pad_token_id = tokenizer.pad_token_id


def check_vocabulary(net: nn.Module, tokenizer: Any, config: Any | None) -> None:
    """Reject a tokenizer with words that the model has no embedding for.

    Tokens that were added to a tokenizer (for images, for unused roles) may be beyond the table:
    `check_tokens` rejects texts in which they occur.

    Args:
        net: the model, real or on the meta device.
        tokenizer: a transformers tokenizer.
        config: the model's configuration, to check its padding token too; None: it is not used.

    Raises:
        ModelError: the largest token, or the padding token, is beyond the table.
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
    """Reject texts with a token that the model has no embedding for.

    Args:
        net: the model, real or on the meta device.
        tokenizer: a transformers tokenizer.
        tokens: `input_ids`, (n, length).
        texts: the n texts.

    Raises:
        ModelError: names the token and the text.
    """
    rows, ids = _embeddings(net), tokens["input_ids"]
    if rows is None or ids.size == 0 or ids.max() < rows:
        return
    row, place = map(int, np.unravel_index(ids.argmax(), ids.shape))
    token = int(ids[row, place])
    raise ModelError(
        f"model.tokenizer: expected tokens below {rows}, the embeddings of the model, got {token}"
        f" ({tokenizer.convert_ids_to_tokens(token)!r}) in the text {texts[row][:_SHOWN]!r}; take"
        " it out of the texts, use the model's own tokenizer, or a model whose embeddings were"
        " resized for this one"
    )


def _embeddings(net: nn.Module) -> int | None:
    """Return how many tokens the model has embeddings for; None where that is not known."""
    try:
        table: Any = net.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def padding_notes(net: nn.Module) -> tuple[str, ...]:
    """Return what the user should know of a classifier that reads padding (XLNet's kind)."""
    summary: Any = getattr(net, "sequence_summary", None)
    kind = getattr(summary, "summary_type", None)
    if kind not in ("last", "mean"):
        return ()
    return (
        f"{type(net).__name__} reads padding too (summary_type {kind!r}): a result depends on which"
        " texts share a batch; model.config.summary_type: first reads the first token alone",
    )


def pad_with(tokens: Tokens, pad: int | None) -> Tokens:
    """Write the padding token behind every text; a text without tokens becomes that one token.

    Args:
        tokens: `input_ids` and `attention_mask`, (n, length), and others.
        pad: the padding token; None: 0.

    Returns:
        The same inputs; what stands in padding never depends on the tokenizer.
    """
    if tokens["input_ids"].shape[1] == 0:
        # No text has a token.
        tokens = {name: np.zeros((len(ids), 1), np.int32) for name, ids in tokens.items()}
    mask = tokens["attention_mask"].copy()
    mask[mask.sum(axis=1) == 0, 0] = 1
    behind = tokens["attention_mask"] == 0
    ids = np.where(behind, np.int32(0 if pad is None else pad), tokens["input_ids"])
    return {**tokens, "input_ids": ids, "attention_mask": mask}


def known_inputs(net: nn.Module, config: Any, tokens: Tokens) -> Tokens:
    """Return the inputs that the model's forward pass takes.

    Raises:
        ModelError: it has fewer token types than the texts.
    """
    takes: Mapping[str, Any] = inspect.signature(net.forward).parameters
    kept = {name: values for name, values in tokens.items() if name in takes}
    types, known = kept.get("token_type_ids"), getattr(config, "type_vocab_size", None)
    if types is not None and isinstance(known, int) and known > 0 and types.max() >= known:
        raise ModelError(
            f"model.tokenizer: expected token types below {known} (type_vocab_size), got"
            f" {types.max()}"
        )
    return kept
