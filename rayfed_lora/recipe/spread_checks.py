"""Checks of numbers that differ between clients. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator

from rayfed_lora.recipe.clients import Spread
from rayfed_lora.recipe.settings import Settings

# Keys whose numbers are counts, also where they differ between clients.
WHOLE = frozenset({"clients.local_steps", "clients.batch_size"})
# Keys, the one to change first, and what is wrong.
_Conflict = tuple[tuple[str, ...], str]


def spread_conflicts(recipe: Settings) -> Iterator[_Conflict]:
    """Yield the conflicts of devices and settings that differ between clients."""
    for path, spread in (recipe.spreads | recipe.own_settings).items():
        yield from _of_spread(path, spread)
    for path, spread in recipe.own_settings.items():
        if path in WHOLE:
            yield from _of_whole(path, spread)


def _of_spread(path: str, spread: Spread) -> Iterator[_Conflict]:
    keys = ("median", "low", "high", "choices", "column")
    given = [key for key in keys if getattr(spread, key) is not None]
    expected = {"lognormal": ["median"], "uniform": ["low", "high"]}[spread.distribution]
    choices, shares = len(spread.choices or ()), len(spread.shares or ())
    if given not in (expected, ["choices"], ["column"]):
        yield (
            (path,),
            f"distribution '{spread.distribution}' expects {' and '.join(expected)}, or choices or"
            f" a column instead, got {', '.join(given) or 'none of them'}",
        )
    elif shares not in (0, choices):
        message = f"expected a share for each of the {choices} choices, got {shares}"
        yield ((f"{path}.shares", f"{path}.choices"), message)
    elif spread.low is not None and spread.high is not None and spread.low > spread.high:
        message = f"expected at most high ({spread.high:g}), got {spread.low:g}"
        yield ((f"{path}.low", f"{path}.high"), message)
    elif spread.sigma > 0 and spread.median is None:
        message = f"expected 0 without a lognormal distribution's median, got {spread.sigma:g}"
        yield ((f"{path}.sigma", path), message)


def _of_whole(path: str, spread: Spread) -> Iterator[_Conflict]:
    """Yield choices and bounds of a number of steps or examples that are no whole numbers."""
    bounds = {"low": spread.low, "high": spread.high}
    given = {key: [value] for key, value in bounds.items() if value is not None}
    for key, values in {**given, "choices": spread.choices or []}.items():
        wrong = [value for value in values if value != int(value)]
        if wrong:
            yield ((f"{path}.{key}", path), f"expected whole numbers, got {wrong[0]:g}")
