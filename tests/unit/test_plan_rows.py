"""Which rounds of a long plan are shown."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import pytest

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.plan_table import MOST_ROWS, show_plan, show_stages, shown_rounds
from rayfed_lora.launching import planning
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe

SMALL = {
    "architecture": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
}


def long(rounds: int) -> Recipe:
    """2 + 2 + 2 rounds, and so many in which the rank stays."""
    return load_recipe(
        {
            "data": {"source": "digits", "max_examples": 90, "partition": {"clients": 6}},
            "model": {"config": SMALL},
            "annealing": {
                "initiating": {"rounds": 2},
                "heating": {"rounds": 2, "rank": 4},
                "cooling": {"rounds": 2, "rank": 1, "shape": "linear"},
                "holding": {"rounds": rounds},
            },
            "clients": {"per_round": 3},
        }
    )


def planned(stage: str, ranks: list[int]) -> list[SimpleNamespace]:
    return [SimpleNamespace(stage=stage, rank=rank) for rank in ranks]


def told(rows: list[int | range]) -> list[int]:
    return list(chain.from_iterable(row if isinstance(row, range) else [row] for row in rows))


def test_a_plan_that_fits_is_shown_whole():
    assert shown_rounds(planned("heating", [4] * MOST_ROWS)) == list(range(MOST_ROWS))


def test_of_a_long_plan_the_ends_of_stages_and_the_falls_of_the_rank_are_shown():
    rounds = [*planned("heating", [4] * 1000), *planned("cooling", [4] * 500 + [2] * 500)]
    rows = shown_rounds(rounds)
    # three rounds at each end of a stage, and round 1500, in which the rank falls
    expected = [0, 1, 2, range(3, 997), 997, 998, 999, 1000, 1001, 1002, range(1003, 1500)]
    assert rows == [*expected, 1500, range(1501, 1997), 1997, 1998, 1999]


def test_a_single_round_between_two_that_are_shown_is_shown_too():
    rounds = planned("cooling", [9, 9, 9, 9, 8, *[8] * 95])
    assert shown_rounds(rounds)[:6] == [0, 1, 2, 3, 4, range(5, 97)]


@pytest.mark.parametrize("count", [61, 100, 5000])
def test_every_round_is_shown_or_counted_once_however_often_the_rank_changes(count):
    rows = shown_rounds(planned("cooling", list(range(count))))
    assert told(rows) == list(range(count))
    assert sum(isinstance(row, int) for row in rows) <= 2 * MOST_ROWS
    assert (rows[:3], rows[-1]) == ([0, 1, 2], count - 1)


def test_the_table_of_a_long_plan_says_how_many_rounds_it_leaves_out():
    recipe = long(1000)
    console = PlainConsole(width=110)
    with console.capture() as captured:
        show_plan(console, recipe, planning.plan(recipe))
    lines = captured.get().splitlines()
    assert sum("holding" in line for line in lines) == 6
    assert any("..." in line and "994 rounds" in line for line in lines)
    assert any("994 of 1,006 rounds are not shown" in line for line in lines)
    assert sum("cooling" in line for line in lines) == 2


def test_the_stages_name_each_rank_once_and_few_of_many():
    recipe = load_recipe(
        {
            "model": {"config": SMALL},
            "annealing": {
                "initiating": {"rounds": 0},
                "heating": {"rounds": 1200, "rank": 16},
                "cooling": {"rounds": 32, "rank": 1, "shape": "linear"},
                "holding": {"rounds": 1},
            },
        }
    )
    console = PlainConsole(width=110)
    with console.capture() as captured:
        show_stages(console, recipe)
    # A linear fall from 16 to 1 in 32 rounds: half a rank a round, 16 ranks in all.
    assert captured.get().splitlines()[1:] == [
        "  heating: 1,200 rounds, rank 16",
        "  cooling: 32 rounds, rank 16, 15, 14, ..., 3, 2, 1",
        "  holding: 1 round, rank 1",
    ]


def test_a_long_plan_costs_as_much_for_each_round_as_a_short_one(monkeypatch):
    asked = []
    locate = planning.schedule.__globals__["locate"]

    def counted(annealing, t):
        asked.append(t)
        return locate(annealing, t)

    monkeypatch.setitem(planning.schedule.__globals__, "locate", counted)
    per_round = []
    for rounds in (50, 200):
        asked.clear()
        planning.plan(long(rounds))
        per_round.append(len(asked) / (rounds + 6))
    assert per_round[1] == pytest.approx(per_round[0], rel=0.1)
