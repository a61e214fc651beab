"""Turns to tokens, with a mask of those whose prediction counts. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfed_lora.data.place import Place
from rayfed_lora.data.raw_tables import opened
from rayfed_lora.errors import DataError, ModelError, did_you_mean
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.templates import ALPACA, BUILT_IN, ChatTemplate, Rendered, Turns
from rayfed_lora.models.wording import one_line
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.faults import closest

# Conversations that are rendered and tokenized at once.
_BATCH = 256
# Characters of a row in a message.
_SHOWN = 60
_OPTION = "data.template"


@dataclass(frozen=True)
class Tokenised:
    """Conversation as tokens, not truncated.

    Attributes:
        text: as rendered.
        ids: (n,) int32.
        counted: (n,) int8, 1 on the tokens of responses and their end tokens.
    """

    text: str
    ids: npt.NDArray[np.int32]
    counted: npt.NDArray[np.int8]


def chat_template(data: Data, tokenizer: Any) -> tuple[ChatTemplate, tuple[str, ...]]:
    """Return the template that a recipe names, and notes for the user.

    Raises:
        DataError: no such template or file.
        ModelError: it cannot be rendered, or the tokenizer tells no places of tokens.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "model.tokenizer: expected a fast tokenizer, which tells the places of tokens in a"
            f" text, for instruction and chat data; got {type(tokenizer).__name__}"
        )
    name = data.template
    if name != "auto":
        return ChatTemplate(tokenizer, _text(name), own=False), ()
    if tokenizer.chat_template is None:
        note = "the tokenizer has no chat template: data.template alpaca is used"
        return ChatTemplate(tokenizer, ALPACA, own=False), (note,)
    try:
        text = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            f"model.tokenizer: expected one chat template, or one named default: {one_line(error)};"
            " give its text as data.template"
        ) from error
    return ChatTemplate(tokenizer, text, own=True), ()


def _text(name: str) -> str:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if "{{" in name or "{%" in name:
        return name
    known = ", ".join(("auto", *BUILT_IN))
    try:
        with opened(name, _OPTION, "a readable file of a Jinja template") as stream:
            text = str(stream.read().decode("utf-8"))
    except DataError as error:
        near = did_you_mean(closest(name, ("auto", *BUILT_IN)))
        raise DataError(f"{error} (or one of {known}, or a Jinja text){near}") from error
    if "{" not in text:
        raise DataError(f"{_OPTION} {name!r}: need a Jinja template, got a file without any {{{{")
    return text


def tokenise_turns(
    tokenizer: Any, template: ChatTemplate, rows: Sequence[Turns], where: Place
) -> Iterator[Tokenised]:
    """Yield the tokens of each row of turns.

    A token belongs to a response if it has a character of it: the places are those of the
    tokenisation of the whole text. Tokens are those of the text alone: templates write begin and
    end tokens.

    Raises:
        DataError: a row that the template cannot render; names the row.
    """
    for low in range(0, len(rows), _BATCH):
        rendered = template.render(rows[low : low + _BATCH])
        texts = []
        for i, each in enumerate(rendered, low):
            if isinstance(each, str):
                first = rows[i][0]["text"][:_SHOWN] if rows[i] else ""
                raise DataError(
                    f"{where}, {where.row(i)} ({first!r}): need turns that data.template can"
                    f" render, got {each}"
                )
            texts.append(each)
        with quiet():
            found = tokenizer(
                [each.text for each in texts], add_special_tokens=False, return_offsets_mapping=True
            )
        for each, ids, offsets in zip(
            texts, found["input_ids"], found["offset_mapping"], strict=True
        ):
            yield Tokenised(each.text, np.array(ids, np.int32), _counted(each, offsets))


def _counted(rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int8]:
    """Return which tokens have a character of a response.

    >>> _counted(Rendered("ab cd", ((3, 5),)), [(0, 2), (2, 4), (4, 5)]).tolist()
    [0, 1, 1]
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    counted = np.zeros(len(starts), np.int8)
    for start, end in rendered.responses:
        counted |= (starts < end) & (ends > start)
    return counted
