"""Instruction and chat data of every kind of file become turns; what is malformed is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rayfed_lora.data.dataset import Dataset, load
from rayfed_lora.errors import DataError, RecipeError
from rayfed_lora.recipe.data import Data
from rayfed_lora.recipe.loading import load_recipe

ROWS = [
    {"domain": f"d{k % 2}", "instruction": f"Add {k}.", "input": "1" * (k % 3), "output": f"is {k}"}
    for k in range(10)
]


def user(row: dict[str, str]) -> str:
    return row["instruction"] + ("\n" + row["input"] if row["input"] else "")


EXPECTED = [
    [{"role": "user", "text": user(r)}, {"role": "assistant", "text": r["output"]}] for r in ROWS
]


def chat(name: str, role: str, text: str, mine: str, theirs: str) -> list[dict[str, Any]]:
    return [
        {name: [{role: mine, text: user(r)}, {role: theirs, text: r["output"]}], "id": i}
        for i, r in enumerate(ROWS)
    ]


def renamed(**names: str) -> list[dict[str, Any]]:
    return [{names[k]: v for k, v in row.items() if k in names} for row in ROWS]


FORMATS: dict[str, list[dict[str, Any]]] = {
    "alpaca": ROWS,
    "dolly": renamed(instruction="instruction", input="context", output="response"),
    "prompt": [{"prompt": user(r), "response": r["output"]} for r in ROWS],
    "completion": [{"prompt": user(r), "completion": r["output"]} for r in ROWS],
    "question": [{"question": user(r), "answer": r["output"]} for r in ROWS],
    "pair": [{"input": user(r), "output": r["output"]} for r in ROWS],
    "sharegpt": chat("conversations", "from", "value", "human", "gpt"),
    "openai": chat("messages", "role", "content", "user", "assistant"),
    # A list for each key, as `datasets` keeps sequences.
    "transposed": [
        {
            "messages": {
                "role": ["user", "assistant"],
                "content": [user(r), r["output"]],
            }
        }
        for r in ROWS
    ],
    # Messages as JSON text, as CSV needs them.
    "written": [
        {"messages": json.dumps(r["messages"])}
        for r in chat("messages", "role", "content", "user", "assistant")
    ],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(source: Path, **options: Any) -> Dataset:
    data = {"source": str(source), "partition": {"kind": "iid", "clients": 2}, **options}
    return load(Data(**data), "causal-lm", 0, 0.0)


def all_turns(dataset: Dataset) -> list[Any]:
    return [*dataset.train["turns"].to_pylist(), *dataset.test["turns"].to_pylist()]


def in_order(rows: list[Any]) -> list[str]:
    return sorted(map(json.dumps, rows))


# CSV has no lists.
CASES = [
    (name, suffix)
    for name in FORMATS
    for suffix in (".jsonl", ".json", ".parquet", ".csv")
    if suffix != ".csv" or name not in ("sharegpt", "openai", "transposed")
]


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_format_is_recognised_by_its_columns(name: str, suffix: str, tmp_path: Path) -> None:
    found = read(write(tmp_path / f"rows{suffix}", FORMATS[name]))
    assert in_order(all_turns(found)) == in_order(EXPECTED)
    assert found.notes == ()


def test_a_system_text_is_a_turn_of_its_own_and_missing_parts_are_none(tmp_path: Path) -> None:
    rows = [{"system_prompt": "Be brief.", "question": "Who?", "response": "Me."}] * 3
    rows += [{"system_prompt": None, "question": "Where?", "response": None}] * 3
    turns = all_turns(read(write(tmp_path / "rows.jsonl", rows)))
    assert sorted({tuple(t["role"] for t in row) for row in turns}) == [
        ("system", "user", "assistant"),
        ("user", "assistant"),
    ]
    assert {row[-1]["text"] for row in turns} == {"Me.", ""}


def test_dates_in_messages_stay_texts(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": f"2020-01-0{k}"}]} for k in range(1, 9)]
    turns = all_turns(read(write(tmp_path / "rows.jsonl", rows)))
    assert sorted(row[0]["text"] for row in turns) == [f"2020-01-0{k}" for k in range(1, 9)]


def test_a_text_used_beside_a_response_is_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{**row, "text": "all"} for row in ROWS])
    plain = read(source, text_column="instruction")
    assert plain.train["text"].to_pylist()[0].startswith("Add")
    assert "trains on the column 'instruction' alone, without 'output'" in plain.notes[0]
    assert "trains on the column 'text' alone" in read(source, format={"kind": "text"}).notes[0]
    assert "the column 'text' is not read" in read(source).notes[0]


def test_texts_stay_texts(tmp_path: Path) -> None:
    rows = [{"text": f"row {k}", "input": "x", "system": "y"} for k in range(5)]
    found = read(write(tmp_path / "rows.jsonl", rows))
    assert found.train.column_names == ["text", "label"]
    assert found.notes == ()


def message(**given: Any) -> list[dict[str, Any]]:
    fine = {"messages": [{"role": "user", "content": "a"}]}
    return [fine, fine, {"messages": [{"role": "user", "content": "b"}, given]}]


FAULTS: list[tuple[list[dict[str, Any]], str]] = [
    (message(role="judge", content="x"), r"row 3, message 2: need a role of user .*got 'judge'"),
    (message(role="user"), r"row 3, message 2: need a text as content, got None"),
    (message(content="x"), r"row 3, message 2: need role and content, or from and value, got the"),
    ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}], r"row 2: need a list"),
    ([{"messages": "[]"}, {"messages": "hello"}], r"row 2: need a list of messages, got a text"),
    (
        [{"instruction": "a", "question": "b", "answer": "c"}] * 3,
        r"need exactly one column instruction, prompt, question or query .*got instruction, quest",
    ),
    ([{"prompt": "a", "answer": "b", "output": "c"}] * 3, r"need exactly one column output, resp"),
    ([{"prompt": None, "answer": "b"}, {"prompt": "a", "answer": "b"}], r"'prompt'.*null in row 1"),
]


@pytest.mark.parametrize(("rows", "expected"), FAULTS)
def test_a_malformed_row_is_named(rows: list[Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=expected):
        read(write(tmp_path / "rows.json", rows))


def test_a_format_that_the_columns_do_not_have_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "a", "title": "b"}] * 4)
    with pytest.raises(DataError, match=r"one column messages or conversations .*got text, title"):
        read(source, format={"kind": "chat"})
    with pytest.raises(DataError, match=r"\(data.format: instruction\), got the columns text"):
        read(source, format={"kind": "instruction"})


LANGUAGE = {"task": "causal-lm", "source": "somewhere"}


def test_a_recipe_names_a_format_in_a_word() -> None:
    recipe = load_recipe({"data": {"format": "chat"}, "model": LANGUAGE})
    assert recipe.data.format.kind == "chat"
    with pytest.raises(RecipeError, match=r"data\.format\.kind: .*chatt") as caught:
        load_recipe({"data": {"format": "chatt"}, "model": LANGUAGE})
    assert caught.value.faults[0].nearest == "chat"


def test_what_only_language_models_take_is_rejected_for_others() -> None:
    with pytest.raises(RecipeError, match=r"data\.format\.kind: expected auto or text with"):
        load_recipe("digits-vit", {"data.format.kind": "chat"})
    with pytest.raises(RecipeError, match=r"data\.packing: expected false with model\.task"):
        load_recipe("digits-vit", {"data.packing": True})
    with pytest.raises(RecipeError, match=r"data\.text_column: expected auto with data\.format"):
        load_recipe({"data": {"format": "chat", "text_column": "a"}, "model": LANGUAGE})
