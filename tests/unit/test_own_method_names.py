"""Methods that no import finds, and where modules of own methods are looked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import rayfed_lora
from rayfed_lora.errors import PluginError, RunError
from rayfed_lora.plugins import shape
from rayfed_lora.plugins.modules import folder_of, origin, permit
from rayfed_lora.plugins.registry import TABLES, method_of
from rayfed_lora.recipe.loading import load_recipe

FALLING = {
    "annealing.initiating.rounds": 0,
    "annealing.heating.rounds": 1,
    "annealing.heating.rank": 8,
    "annealing.cooling.rounds": 3,
    "annealing.cooling.rank": 2,
    "annealing.holding.rounds": 0,
}


def held_at(rank: float) -> Any:
    """A shape made inside a function: each has the same name."""

    @shape()
    def held(start: float, end: float, u: float) -> float:
        return rank

    return held


@pytest.fixture(autouse=True)
def _tables_as_before() -> Any:
    yield
    for name in [m.name for m in TABLES["shape"].methods() if m.module == __name__]:
        TABLES["shape"].remove(name)


def ranks(*plugins: Any) -> list[int | None]:
    recipe = load_recipe("digits-vit", FALLING, plugins=plugins)
    return [planned.rank for planned in rayfed_lora.plan(recipe).rounds]


def test_of_two_methods_of_one_name_the_one_handed_over_is_used() -> None:
    first, second = held_at(3), held_at(5)
    assert ranks(first()) == [8, 3, 3, 2]
    assert ranks(second()) == [8, 5, 5, 2]
    with pytest.raises(PluginError, match="expected one shape 'held', got two"):
        permit([first, second])


def test_what_a_method_encloses_is_part_of_its_code() -> None:
    first, again, second = (origin(method_of(held_at(r))).sha256 for r in (3, 3, 5))  # type: ignore[arg-type]
    assert first == again != second


def test_the_ranks_that_acceptance_steps_on_are_those_of_the_present_shape() -> None:
    from rayfed_lora.annealing.stages import ladder

    keys = {**FALLING, "annealing.cooling.shape": "held"}
    for rank in (3, 5):
        recipe = load_recipe("digits-vit", keys, plugins=[held_at(rank)])
        assert ladder(recipe.annealing) == (8, rank, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "none"])
def test_a_shape_that_gives_no_number_is_named_with_the_round(value: Any) -> None:
    with pytest.raises(RunError, match=r"shape 'held' (failed )?in round 2"):
        ranks(held_at(value)())


def test_the_working_directory_is_searched_only_for_modules_that_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", here)])
    (tmp_path / "wandb.py").write_text("raise SystemExit('a stranger')\n")
    load_recipe("digits-vit")
    permit([held_at(3)])
    assert here not in sys.path
    with pytest.raises(PluginError):
        permit(["rayfed_lora_no_such_module"])
    assert here in sys.path


def test_a_package_without_init_is_sent_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare_package").mkdir()
    (tmp_path / "bare_package" / "curves.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert folder_of("bare_package.curves") == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_methods.py", "expected the name of a module, such as 'my_methods'"),
        ("../there/my_methods.py", "expected the name of a module, such as 'my_methods'"),
        ("__main__", "expected the methods of this notebook or script themselves"),
    ],
)
def test_what_is_no_name_of_a_module_is_told_so(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        permit([name])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"share": "x"}, r"rule 'trimmed-mean': option share: .* got 'x'; its options are share"),
        ({"shares": 0.1}, r"rule 'trimmed-mean': option shares: .*; its options are share"),
        ({"share": 0.9}, r"option share: .* less than .* got 0.9"),
    ],
)
def test_an_option_that_a_method_does_not_take_is_told(options: dict[str, Any], told: str) -> None:
    from rayfed_lora.aggregation.built_in.trimmed_mean import trimmed_mean

    with pytest.raises(PluginError, match=told):
        trimmed_mean(**options)
