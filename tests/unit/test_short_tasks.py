"""The short tasks that the recipe smollm2-instruct learns: right answers, none of them twice."""

from __future__ import annotations

from datetime import datetime

import pyarrow as pa
import pytest

from rayfed_lora.data.dataset import load
from rayfed_lora.data.short_tasks import read_short_tasks
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data


def answered(domain: str, instruction: str) -> str:
    """The answer to a task, from its words alone."""
    text = instruction.rstrip(".").replace("?", " ? ").replace(":", " : ").split()
    if domain == "addition":
        return str(int(text[3]) + int(text[5]))
    if domain == "dates":
        return datetime.strptime(" ".join(text[1:4]), "%d %B %Y").date().isoformat()
    if domain == "capitals":
        return " ".join(text[text.index(":") + 1 :]).upper()
    if domain == "counting":
        return str(len(text[text.index("?") + 1 :]))
    if domain == "numbers":
        return ", ".join(map(str, range(int(text[5]), int(text[7]) + 1)))
    return text[text.index("?") + 2]


def test_answers_are_right_and_no_task_is_there_twice() -> None:
    found = read_short_tasks(50, 10)
    assert found.test is not None
    rows = pa.concat_tables([found.train, found.test]).to_pylist()
    assert (found.train.num_rows, found.test.num_rows) == (300, 60)
    assert len({row["instruction"] for row in rows}) == 360
    for row in rows:
        assert row["output"] == answered(row["domain"], row["instruction"]), row
    assert read_short_tasks(50, 10).train == found.train


def test_options_say_how_many() -> None:
    data = Data.model_validate(
        {
            "source": "short-tasks",
            "train": 4,
            "test": 2,
            "partition": {"kind": "column", "column": "domain"},
        }
    )
    found = load(data, "causal-lm", 0, 0.0)
    assert (found.train.num_rows, found.test.num_rows) == (24, 12)
    assert len(found.clients or ()) == 6
    assert found.test["client"].to_pylist() == found.test["domain"].to_pylist()


def test_more_tasks_than_there_are_is_an_error() -> None:
    with pytest.raises(DataError, match=r"at most 300 tasks a domain, got 291 [+] 10"):
        read_short_tasks(291, 10)
    assert read_short_tasks(290, 10).train.num_rows == 6 * 290
