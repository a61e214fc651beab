"""Rows of instruction and chat data as turns: a role and a text each.

Formats: Alpaca (instruction, input, output), prompt and response, question and answer; ShareGPT
(conversations of from and value) and OpenAI (messages of role and content).
Source: github.com/tatsu-lab/stanford_alpaca; the data formats of TRL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.data import columns, naming
from rayfed_lora.data.columns import AUTO
from rayfed_lora.data.place import Place
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data

Kind = Literal["text", "instruction", "chat"]
# The column of turns, and its type.
TURNS = "turns"
TYPE = pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))
ASSISTANT = "assistant"

_SYSTEMS = ("system", "system_prompt")
_PROMPTS = ("instruction", "prompt", "question", "query")
_INPUTS = ("input", "context")
_RESPONSES = ("output", "response", "completion", "answer")
_CHATS = ("messages", "conversations")
_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), ASSISTANT),
    "system": "system",
    "tool": "tool",
}
_EXPECTED_ROLES = "user (human), assistant (gpt), system or tool"


@dataclass(frozen=True)
class Format:
    """How the rows of a table are written.

    Attributes:
        kind: of the rows.
        names: of the columns, by what they hold (prompt, input, response, system, chat).
        notes: for the user, one line each.
    """

    kind: Kind
    names: Mapping[str, str]
    notes: tuple[str, ...] = ()


def column_names(data: Data) -> tuple[str, ...]:
    """Return the columns that turns may be made of; none where a recipe asks for plain texts."""
    if _wants_text(data):
        return ()
    return (*_SYSTEMS, *_PROMPTS, *_INPUTS, *_RESPONSES, *_CHATS)


def format_of(table: pa.Table, data: Data, where: Place) -> Format:
    """Return the format of a table's rows, which `data.format` names or its columns tell.

    Raises:
        DataError: the columns do not have the wanted format, or several.
    """
    known = table.column_names
    if not _wants_text(data):
        chats = [name for name in _CHATS if name in known]
        wanted = data.format.kind
        if wanted == "chat" or (wanted == AUTO and chats):
            return Format("chat", {"chat": _only(chats, _CHATS, "chat", table, where)})
        names = _instruction(table, where)
        if names is not None:
            note = (
                f"{where}: the columns {', '.join(names.values())} become turns, the column 'text'"
                " is not read (data.format: text trains on it instead)"
            )
            return Format("instruction", names, (note,) * ("text" in known))
        if wanted == "instruction":
            raise DataError(
                f"{where}: need a column {_either(_PROMPTS)} and a column {_either(_RESPONSES)}"
                f" (data.format: instruction), got the columns {', '.join(known)}"
            )
    return Format("text", {}, _beside(table, data, where))


def as_turns(table: pa.Table, form: Format, where: Place) -> pa.ChunkedArray:
    """Return the turns of each row, of type `TYPE`.

    An instruction and its input make one turn of the user, on lines of their own. Responses may be
    null or empty.

    Raises:
        DataError: a row that cannot be read; names the row and what was expected.
    """
    if form.kind == "chat":
        column, place = columns.pick(table, (form.names["chat"],), "format", where)
        rows = [_chat(value, place, i) for i, value in enumerate(column.to_pylist())]
    else:
        rows = _pairs(table, form.names, where)
    long = next((i for i, row in enumerate(rows) if _size(row) > columns.MOST_CHARACTERS), None)
    if long is not None:
        raise DataError(
            f"{where}: need turns of at most {columns.MOST_CHARACTERS:,} characters a row, got"
            f" {_size(rows[long]):,} in {where.row(long)}; shorten or remove it"
        )
    return pa.chunked_array([pa.array(rows, TYPE)])


def responds(turns: Iterable[Mapping[str, str]]) -> bool:
    """Return whether a turn of the assistant has any text."""
    return any(turn["role"] == ASSISTANT and turn["text"].strip() for turn in turns)


def _wants_text(data: Data) -> bool:
    wanted = data.format.kind
    return wanted == "text" or (wanted == AUTO and data.text_column != AUTO)


def _instruction(table: pa.Table, where: Place) -> dict[str, str] | None:
    """Return the columns of an instruction format; None where there are none."""
    known = table.column_names
    prompts, responses, inputs, systems = (
        [name for name in names if name in known and _is_text(table, name)]
        for names in (_PROMPTS, _RESPONSES, _INPUTS, _SYSTEMS)
    )
    if not responses or not (prompts or "input" in inputs):
        return None
    if not prompts:
        # Pairs of input and output.
        prompts, inputs = ["input"], [name for name in inputs if name != "input"]
    found = {
        "prompt": _only(prompts, _PROMPTS, "instruction", table, where),
        "response": _only(responses, _RESPONSES, "instruction", table, where),
    }
    if inputs:
        found["input"] = _only(inputs, _INPUTS, "instruction", table, where)
    if systems:
        found["system"] = _only(systems, _SYSTEMS, "instruction", table, where)
    return found


def _only(
    found: Sequence[str], names: Sequence[str], kind: str, table: pa.Table, where: Place
) -> str:
    if len(found) == 1:
        return found[0]
    got = ", ".join(found or table.column_names)
    advice = "remove or rename the others" if found else "rename the column"
    raise DataError(
        f"{where}: need exactly one column {_either(names)} (data.format: {kind}), got {got};"
        f" {advice}, or set data.format: text and data.text_column"
    )


def _is_text(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(table.column_names.index(name)).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return naming.is_text(kind) or pa.types.is_null(kind)


def _beside(table: pa.Table, data: Data, where: Place) -> tuple[str, ...]:
    """Return a note where a text is used alone, and a column beside it looks like its response."""
    used = next((n for n in columns.candidates(data, "text_column") if n in table.column_names), "")
    others = [n for n in (*_RESPONSES, *_CHATS) if n in table.column_names and n != used]
    if not used or not others:
        return ()
    return (
        f"{where}: trains on the column {used!r} alone, without {others[0]!r} beside it; with"
        " data.format: instruction or chat, and without data.text_column, both become turns",
    )


def _pairs(table: pa.Table, names: Mapping[str, str], where: Place) -> list[Any]:
    """Return the turns of rows with a prompt and a response."""
    prompts = _texts(table, names["prompt"], where)
    responses = _texts(table, names["response"], where, nulls=True)
    empty = [""] * table.num_rows
    inputs, systems = (
        _texts(table, names[part], where, nulls=True) if part in names else empty
        for part in ("input", "system")
    )
    rows = []
    for system, prompt, given, response in zip(systems, prompts, inputs, responses, strict=True):
        turns = [_turn("system", system)] if system.strip() else []
        turns.append(_turn("user", f"{prompt}\n{given}" if given.strip() else prompt))
        rows.append([*turns, _turn(ASSISTANT, response)])
    return rows


def _texts(table: pa.Table, name: str, where: Place, *, nulls: bool = False) -> list[str]:
    column, place = columns.pick(table, (name,), "format", where)
    if nulls:
        column = naming.plain(column)
        is_null = pa.types.is_null(column.type)
        column = pc.fill_null(pc.cast(column, pa.string()) if is_null else column, "")
    texts: list[str] = columns.as_strings(column, place).to_pylist()
    return texts


def _chat(value: Any, place: Place, row: int) -> list[dict[str, str]]:
    """Return the turns of a row of messages, which may be written as JSON text."""
    where = f"{place}, {place.row(row)}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: need a list of messages, got a text: {error}") from error
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        # As `datasets` keeps a sequence of mappings: a list for each key.
        parts = zip(*value.values(), strict=False)
        value = [dict(zip(value, part, strict=True)) for part in parts]
    if not isinstance(value, list):
        raise DataError(f"{where}: need a list of messages, got {_shown(value)}")
    return [_message(each, f"{where}, message {i}") for i, each in enumerate(value, 1)]


def _message(message: Any, where: str) -> dict[str, str]:
    expected = f"{where}: need role and content, or from and value"
    if not isinstance(message, dict):
        raise DataError(f"{expected}, got {_shown(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    named, text = (given.get(a, given.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if named is None:
        raise DataError(f"{expected}, got the keys {', '.join(given) or 'none'}")
    role = _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise DataError(f"{where}: need a role of {_EXPECTED_ROLES}, got {_shown(named)}")
    if not isinstance(text, str):
        advice = "; calls of tools are not read" if "tool_calls" in given else ""
        raise DataError(f"{where}: need a text as content, got {_shown(text)}{advice}")
    return _turn(role, text)


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "text": text}


def _size(turns: Sequence[Mapping[str, str]]) -> int:
    return sum(len(turn["text"]) for turn in turns)


def _shown(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
