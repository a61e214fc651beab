"""Bad settings of clients' own end the command with status 2, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli import Command, command, elsewhere, texts  # noqa: F401 - fixtures

# Per row: two clients of ten examples each.
COLUMNS: dict[str, Any] = {
    "rate": lambda client, i: [0.1, 0.2][client],
    "word": lambda client, i: "fast",
    "gap": lambda client, i: None if (client, i) == (1, 3) else 0.1,
    "below": lambda client, i: [0.1, -0.2][client],
    "mixed": lambda client, i: 0.1 + i,
    "half": lambda client, i: [2, 2.5][client],
}


@pytest.fixture
def recipe(texts: Path) -> Path:  # noqa: F811
    """The recipe with further columns of numbers."""
    table = texts.parent / "questions.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row, line in enumerate(rows):
        client, i = divmod(row, 10)
        line |= {name: value(client, i) for name, value in COLUMNS.items()}
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return texts


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["clients.optimizer.lr={column: speed}"], ["need a column speed"]),
        (["clients.optimizer.lr={column: word}"], ["column 'word'", "number"]),
        (["clients.optimizer.lr={column: gap}"], ["column 'gap'"]),
        (["clients.optimizer.lr={column: below}"], ["column 'below'", "-0.2"]),
        (
            ["clients.optimizer.lr={column: mixed}"],
            [
                "clients.optimizer.lr: column 'mixed': expected one value in all examples",
                "for client 0",
            ],
        ),
        (
            ["clients.local_steps={column: half}"],
            ["clients.local_steps: column 'half': expected whole numbers, got 2.5", "for client 1"],
        ),
        (["clients.optimizer.lr=-0.1"], ["clients.optimizer.lr: expected greater than 0"]),
        (["clients.local_steps=0.5"], ["clients.local_steps: expected a valid integer, got 0.5"]),
        (["clients.local_steps={choices: [0.5, 2]}"], ["clients.local_steps.choices", "0.5"]),
        (["clients.optimizer.lr={choices: [0.1, -1]}"], ["clients.optimizer.lr.choices", "-1"]),
        (
            ["clients.batch_size={choices: [4, 8], shares: [1, 2, 3]}"],
            ["clients.batch_size.shares: expected a share for each of the 2 choices, got 3"],
        ),
        (
            ["clients.local_steps={median: 3}", "clients.local_epochs=1"],
            ["expected local_steps or local_epochs, got both"],
        ),
        (
            [
                "clients.objective=feddyn",
                "annealing.mode=full",
                "aggregation.server_optimizer.lr=2",
            ],
            ["aggregation.server_optimizer: 'feddyn' steps", "expected sgd with lr 1"],
        ),
        (
            ["aggregation.rule=local-only", "annealing.mode=full"],
            ["annealing.mode: 'local-only' sends nothing"],
        ),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_bad_settings_of_clients_own_are_rejected_with_status_2_and_their_key(
    command: Command,  # noqa: F811
    recipe: Path,
    elsewhere: Path,  # noqa: F811
    settings: list[str],
    told: list[str],
) -> None:
    sets = [part for each in settings for part in ("--set", each)]
    outcome = command("run", recipe, "--out", "out", *sets)
    assert outcome.status == 2, outcome.err
    for part in told:
        assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert list(elsewhere.iterdir()) == []


def test_a_plan_tells_the_range_of_columns_and_draws(
    command: Command,  # noqa: F811
    recipe: Path,
) -> None:
    sets = ["clients.optimizer.lr={column: rate}", "clients.batch_size={choices: [3]}"]
    outcome = command("plan", recipe, *(part for each in sets for part in ("--set", each)))
    assert outcome.status == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "clients.optimizer.lr 0.1 to 0.2" in shown
    assert "clients.batch_size 3" in shown
