"""Texts and turns of a data set as tokens, before they are dealt to clients.

Source: this project; losses over responses only as in the instruction tuning of arXiv:2212.10560.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfed_lora.data.columns import LANGUAGE_TASK
from rayfed_lora.data.dataset import Dataset
from rayfed_lora.data.examples import COUNTED
from rayfed_lora.data.place import Place
from rayfed_lora.data.turns import TURNS, responds
from rayfed_lora.errors import DataError
from rayfed_lora.models.conversations import chat_template, tokenise_turns
from rayfed_lora.models.tokens import whole_texts
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.matching import Match

# The column of tokens, (n,) int32 a row; `COUNTED` beside it has 1 on those that count.
IDS = "ids"


@dataclass(frozen=True)
class TextCounts:
    """What became of the training rows of instruction or chat data.

    Attributes:
        rows: number of rows read.
        cut: rows of more than `data.max_length` tokens, which lose their last tokens.
        unanswered: rows without a response: `cut_off` of them lose it with their last tokens. With
            `data.loss_on: response` they are left out.
        prompt_tokens: tokens that are kept, of all but the responses.
        response_tokens: tokens of the responses, with their end tokens.
        longest: tokens of the longest row, uncut.
    """

    rows: int
    cut: int
    unanswered: int
    cut_off: int
    prompt_tokens: int
    response_tokens: int
    longest: int

    def line(self, data: Data) -> str:
        """Return the counts for the user."""
        return (
            f"training texts: {self.rows:,} rows, {self.cut:,} of them cut at {data.max_length}"
            f" tokens (the longest has {self.longest:,}), {self.unanswered:,} without a response;"
            f" {self.prompt_tokens:,} tokens of prompts, {self.response_tokens:,} of responses"
        )


@dataclass(frozen=True)
class Texts:
    """A model and its data, tokenised where that decides which rows are trained on.

    Attributes:
        match: its tables have `IDS` and `COUNTED` in place of turns, and of texts to be packed.
        counts: of instruction and chat data.
        template: the text of their chat template, for the exported tokenizer.
    """

    match: Match
    counts: TextCounts | None = None
    template: str | None = None


def tokenised(match: Match, recipe: Recipe) -> Texts:
    """Return the data with turns, and texts to be packed, as tokens; other data as they are.

    Raises:
        DataError: a row cannot be rendered, or no row of a split has a response left.
        ModelError: the template or the tokenizer cannot be used.
    """
    data, dataset = recipe.data, match.dataset
    if recipe.model.task != LANGUAGE_TASK:
        return Texts(match)
    if TURNS not in dataset.train.column_names:
        return Texts(_with_tokens(match, data)) if data.packing else Texts(match)
    template, notes = chat_template(data, match.tokenizer)
    tables, found = {}, {}
    for name in ("train", "test", "validation"):
        table = getattr(dataset, name)
        if table is None:
            continue
        where = Place(f"data.source {data.source!r}, {name} rows")
        turns = table[TURNS].to_pylist()
        rows = list(tokenise_turns(match.tokenizer, template, turns, where))
        answered = [responds(row) for row in turns]
        kept, found[name] = _kept(
            [r.ids for r in rows], [r.counted for r in rows], answered, data, where
        )
        tables[name] = _table(
            table.drop_columns([TURNS]),
            [row.text for row in rows],
            [row.ids[: data.max_length] for row in rows],
            [row.counted[: data.max_length] for row in rows],
        ).filter(pa.array(kept))
    counts = found["train"]
    notes = (*notes, *_notes(found, data))
    changed: Dataset = replace(dataset, **tables)
    matched = replace(match, dataset=changed, notes=(*match.notes, *notes))
    return Texts(matched, counts, None if template.own else template.text)


def counted_of(table: pa.Table, data: Data) -> list[npt.NDArray[np.int32]] | None:
    """Return which tokens of each row count; None where all of them do."""
    if COUNTED not in table.column_names or data.loss_on == "all":
        return None
    return _arrays(table[COUNTED], np.int32)


def ids_of(table: pa.Table) -> list[npt.NDArray[np.int32]]:
    """Return the tokens of each row."""
    return _arrays(table[IDS], np.int32)


def masks_of(table: pa.Table) -> list[npt.NDArray[np.int32]]:
    """Return, for each row, 1 on the tokens of responses."""
    return _arrays(table[COUNTED], np.int32)


def _arrays(column: pa.ChunkedArray, kind: Any) -> list[Any]:
    return [np.asarray(row.values.to_numpy(), kind) for row in column]


def _with_tokens(match: Match, data: Data) -> Match:
    """Return the data with the tokens of each text."""
    dataset = match.dataset

    def added(table: pa.Table | None) -> pa.Table | None:
        if table is None:
            return None
        ids = whole_texts(match.tokenizer, table["text"].to_pylist(), data.max_length)
        return table.append_column(IDS, pa.array(ids, pa.list_(pa.int32())))

    train, test, validation = map(added, (dataset.train, dataset.test, dataset.validation))
    changed = replace(dataset, train=train, test=test, validation=validation)
    return replace(match, dataset=changed)


def _table(
    table: pa.Table, texts: list[str], ids: Sequence[Any], counted: Sequence[Any]
) -> pa.Table:
    """Return a table with the text, the tokens and the mask of each row."""
    table = table.add_column(0, "text", pa.array(texts, pa.string()))
    table = table.append_column(IDS, pa.array(ids, pa.list_(pa.int32())))
    return table.append_column(COUNTED, pa.array(counted, pa.list_(pa.int8())))


def _kept(
    ids: Sequence[npt.NDArray[np.int32]],
    counted: Sequence[npt.NDArray[np.int8]],
    answered: Sequence[bool],
    data: Data,
    where: Place,
) -> tuple[npt.NDArray[np.bool_], TextCounts]:
    """Return which rows are used, and the counts of all."""
    most = data.max_length
    lengths = np.array([len(row) for row in ids])
    # The first token of a text is not predicted.
    left = np.array([int(row[1:most].sum()) for row in counted])
    has, responds_still = np.array(answered, bool), left > 0
    kept = has & responds_still if data.loss_on == "response" else np.minimum(lengths, most) > 1
    cut_off = int((has & ~responds_still).sum())
    responses = int(left[kept].sum())
    counts = TextCounts(
        rows=len(ids),
        cut=int((lengths > most).sum()),
        unanswered=int((~(has & responds_still)).sum()),
        cut_off=cut_off,
        prompt_tokens=int(np.minimum(lengths, most)[kept].sum()) - responses,
        response_tokens=responses,
        longest=int(lengths.max(initial=0)),
    )
    if len(ids) > 0 and not kept.any():
        advice = (
            f"data.max_length {most} cuts {cut_off:,} responses off whole, the longest row has"
            f" {counts.longest:,} tokens: raise data.max_length"
            if cut_off > 0
            else "no row has a text in a turn of the assistant"
        )
        raise DataError(f"{where}: need rows with a response to learn from, got none; {advice}")
    return kept, counts


def _notes(found: dict[str, TextCounts], data: Data) -> Iterator[str]:
    """Yield what the user should know of rows that are cut or left out, by split."""
    for name, counts in found.items():
        what = f"{name} rows: {{}} of {counts.rows:,}"
        if counts.unanswered > 0 and data.loss_on == "response":
            yield (
                f"{what.format(f'{counts.unanswered:,}')} have no response and are left out"
                f" ({counts.cut_off:,} because data.max_length {data.max_length} cuts it off)"
            )
        if counts.cut > 0:
            yield (
                f"{what.format(f'{counts.cut:,}')} are cut at data.max_length {data.max_length}"
                f" tokens, the longest has {counts.longest:,}"
            )
