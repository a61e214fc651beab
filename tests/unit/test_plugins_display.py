"""`rayfed-lora plugins` lists every kind, with the methods of plug-ins where there are any."""

from __future__ import annotations

import pytest

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.plugins_display import show_methods
from rayfed_lora.plugins import data, model
from rayfed_lora.plugins.registry import TABLES


def lines() -> list[str]:
    console = PlainConsole(width=200)
    with console.capture() as capture:
        show_methods(console)
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.usefixtures("forgotten_methods")
def test_all_kinds_are_listed_also_one_that_has_no_method_yet():
    assert not TABLES["model"].methods()
    shown = lines()
    heads = {line.partition(" (")[0] for line in shown if line.endswith(")")}
    assert set(TABLES) <= heads
    assert shown[shown.index("model (model.source)") + 1] == "none but those of plug-ins"

    @model("small-of-a-test", task="causal-lm")
    def small(vocabulary, length, *, width: int = 4):
        """A small one."""

    @data("rows-of-a-test")
    def rows(*, count: int = 3):
        """Three rows."""

    shown = lines()
    for name, said in (
        ("small-of-a-test", "width=4; A small one."),
        ("rows-of-a-test", "count=3; Three rows."),
    ):
        (line,) = [line for line in shown if line.startswith(name)]
        assert said in line and __name__ in line
    assert "none but those of plug-ins" not in shown
