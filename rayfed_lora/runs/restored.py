"""Whether a checkpoint belongs to the run that goes on from it.

Source: this project.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

# Of typing only from Python 3.12 on, as pydantic needs it.
from typing_extensions import NotRequired, TypedDict

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.executor import Population
from rayfed_lora.federation.ledger import Totals
from rayfed_lora.federation.progress import Timing
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.checkpoints import Snapshot

_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Ledger(TypedDict):
    steps: list[_Count]
    factors: dict[str, _Count]
    totals: Totals


class _Facts(TypedDict):
    base_root: _Count
    base_merges: _Count
    scales: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    rank: _Count | None
    trainable: Literal["full", "adapter"]
    validation: Scores | None
    best_at_heating: float | None
    timing: Timing
    ledger: _Ledger
    clock_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tables: NotRequired[dict[str, _Count]]
    data: NotRequired[dict[str, str]]


_FACTS: TypeAdapter[_Facts] = TypeAdapter(_Facts)


def changed_data(snapshot: Snapshot, population: Population) -> str | None:
    """Return in what the data of a checkpoint's run differ from those there are now, if at all.

    Checkpoints of earlier versions do not say what their data were. Those versions had other orders
    of classes and clients, and prepared images and texts otherwise, for many sources.
    """
    before, now = snapshot.facts.get("data"), population.fingerprint
    if not now:
        return None
    if not isinstance(before, Mapping) or not before:
        return (
            "an earlier version wrote it, which may have numbered classes and clients and prepared"
            " images and texts otherwise, and did not keep how"
        )
    parts = [part for part in now if before.get(part) != now[part]]
    if not parts:
        return None
    return f"the data are not those that the run began with; these differ: {', '.join(parts)}"


def check(snapshot: Snapshot, recipe: Recipe, population: Population) -> None:
    """Check the kinds of a checkpoint's facts, and its arrays against model and clients.

    Moments are not looked at: those of another shape start anew (`OptimizerStep`).

    Raises:
        ValueError: something is missing, or of another kind or shape.
    """
    _FACTS.validate_json(json.dumps(dict(snapshot.facts)), strict=True)
    for kind, versions in snapshot.held.items():
        _expect(f"held {kind}", versions, (population.clients,), "i")
    adapter = snapshot.facts["trainable"] == "adapter"
    modules = population.shape.modules if adapter else {}
    # Where all goes into the base there are none between two rounds.
    stacked = RULES[recipe.aggregation.rule].restarts
    if snapshot.state.factors or not stacked:
        _expect_names("factors", snapshot.state.factors, modules)
    shape, dense = population.shape, snapshot.state.dense
    if adapter:
        _expect_names("tensors", dense, shape.head)
    values = sum(tensor.size for tensor in dense.values())
    expected = shape.head_params if adapter else shape.total_params
    if values != expected:
        raise ValueError(f"tensors: expected {expected} values in all, got {values}")
    for name, factors in snapshot.state.factors.items():
        rank = factors.a.shape[0] if factors.a.ndim else 0
        _expect(f"A of {name}", factors.a, (rank, modules[name].d_in), "f")
        _expect(f"B of {name}", factors.b, (modules[name].d_out, rank), "f")
    for client, own in snapshot.personal.items():
        if not 0 <= client < population.clients:
            raise ValueError(
                f"own factors: expected clients 0 to {population.clients - 1}, got {client}"
            )
        _expect_names(f"own factors of client {client}", own, snapshot.state.factors)
        for name, b in own.items():
            _expect(f"B of {name} of client {client}", b, snapshot.state.factors[name].b.shape, "f")


def _expect_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    if set(found) != set(expected):
        raise ValueError(
            f"expected {what} of {', '.join(expected) or 'nothing'}, got {', '.join(found)}"
        )


def _expect(name: str, array: Any, shape: tuple[int, ...], kind: str) -> None:
    if array.shape != shape or array.dtype.kind != kind:
        raise ValueError(f"{name}: expected shape {shape}, got {array.dtype} of {array.shape}")
