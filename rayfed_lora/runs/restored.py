"""A run as a checkpoint holds it, and whether it may resume from there. Source: this project."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

# Part of typing only from Python 3.12 on, as pydantic needs it.
from typing_extensions import NotRequired, TypedDict

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import RunFolderError
from rayfed_lora.federation.bills import Totals
from rayfed_lora.federation.evaluation import BUILT_IN
from rayfed_lora.federation.ledger import Ledger
from rayfed_lora.federation.run import Run, Timing
from rayfed_lora.federation.sampling import ClientHistory
from rayfed_lora.federation.selection import Kept, Selection
from rayfed_lora.objectives.objective import Arrays, Part, trained_shapes
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.objectives.remembered import of_objective
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints
from rayfed_lora.runs.checkpoints import Snapshot
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Population
from rayfed_lora.types import AdapterState, GlobalModel, ModelShape

_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Ledger(TypedDict):
    steps: list[_Count]
    factors: dict[str, _Count]
    totals: Totals


class _Selection(TypedDict):
    kept: tuple[_Count, float] | None
    best: float | None
    waited: _Count
    stopped_by: str | None
    asked_by: NotRequired[str | None]


class _Facts(TypedDict):
    base_root: _Count
    base_merges: _Count
    scales: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    rank: _Count | None
    trainable: Literal["full", "adapter"]
    validation: dict[str, float | None] | None
    best_at_heating: float | None
    timing: Timing
    ledger: _Ledger
    clock_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tables: dict[str, _Count]
    data: dict[str, str]
    # Absent from checkpoints of earlier versions.
    selection: NotRequired[_Selection]


_FACTS: TypeAdapter[_Facts] = TypeAdapter(_Facts)
# Fields of a `Run` that are JSON values.
_OF_RUN = ("rank", "validation", "best_at_heating", "timing", "clock_s")
# The same of its `Selection`.
_OF_SELECTION = ("best", "waited", "stopped_by", "asked_by")


def snapshot(
    run: Run, ledger: Ledger, timing: Timing, tables: Mapping[str, int], data: Mapping[str, str]
) -> Snapshot:
    """Return a checkpoint's content: the run, its ledger, rows by table, fingerprint of the data.

    `timing` includes this process's share of the wall time.
    """
    booked, held = ledger.snapshot()
    facts = {name: getattr(run, name) for name in _OF_RUN} | {"timing": timing}
    facts |= {"trainable": run.model.trainable, "ledger": booked, "tables": tables, "data": data}
    kept = run.selection.kept
    facts["selection"] = {
        "kept": None if kept is None else (kept.round, kept.value),
        **{key: getattr(run.selection, key) for key in _OF_SELECTION},
    }
    return Snapshot(
        rounds=run.rounds,
        state=run.model.state,
        base=run.model.base,
        held=held,
        facts=json.loads(json.dumps(facts, default=vars)),
        moments=run.moments,
        personal=run.personal,
        history={} if run.history is None else vars(run.history),
        memory=run.memory,
        shared=run.shared,
        kept=None if kept is None else kept.model,
    )


def accepted(
    folder: RunFolder, recipe: Recipe, population: Population, note: Callable[[str], None]
) -> Snapshot | None:
    """Return the checkpoint that a run resumes from, None where there is none. Writes nothing.

    `note` is called with a line about each checkpoint that is passed over. Raises RunFolderError
    where they are damaged, or do not belong to these data.
    """
    found = checkpoints.newest(folder, note)
    if found is None:
        return None
    where = f"cannot go on from the checkpoint of round {found.rounds} in {folder.location}"
    changed = changed_data(found, population)
    if changed is not None:
        raise RunFolderError(f"{where}: {changed}; start anew with another --out")
    try:
        check(found, recipe, population)
    except ValueError as error:
        raise RunFolderError(f"{where}: {type(error).__name__}: {error}") from error
    return found


def run_of(snapshot: Snapshot, ledger: Ledger) -> Run:
    """Return the run that a checked checkpoint holds, and set the ledger back to it."""
    facts = _FACTS.validate_json(json.dumps(dict(snapshot.facts)))
    ledger.restore(facts["ledger"], snapshot.held)
    return Run(
        rounds=snapshot.rounds,
        model=GlobalModel(snapshot.state, snapshot.base, facts["trainable"]),
        rank=facts["rank"],
        validation=facts["validation"],
        best_at_heating=facts["best_at_heating"],
        timing=facts["timing"],
        clock_s=facts["clock_s"],
        moments=snapshot.moments,
        personal=snapshot.personal,
        history=ClientHistory(**snapshot.history) if snapshot.history else None,
        memory=snapshot.memory,
        shared=snapshot.shared,
        selection=_selection(snapshot, facts.get("selection")),
    )


def _selection(snapshot: Snapshot, found: _Selection | None) -> Selection:
    if found is None:
        return Selection()
    kept = None
    if found["kept"] is not None and snapshot.kept is not None:
        kept = Kept(*found["kept"], snapshot.kept)
    return Selection(
        kept, found["best"], found["waited"], found["stopped_by"], found.get("asked_by")
    )


def changed_data(snapshot: Snapshot, population: Population) -> str | None:
    """Return in what the data of a checkpoint's run differ from those there are now, if at all.

    Checkpoints of earlier versions do not say what their data were. Those versions had other orders
    of classes and clients, and prepared images and texts otherwise, for many sources.
    """
    before, now = snapshot.facts.get("data"), population.fingerprint
    if not now and "tables" in snapshot.facts:
        return None
    if not isinstance(before, Mapping) or not before or "tables" not in snapshot.facts:
        return (
            "an earlier version wrote it, which may have numbered classes and clients and prepared"
            " images and texts otherwise, and did not keep how"
        )
    parts = ", ".join(part for part in now if before.get(part) != now[part])
    text = f"the data are not those that the run began with; these differ: {parts}"
    return text if parts else None


def check(snapshot: Snapshot, recipe: Recipe, population: Population) -> None:
    """Check a checkpoint's facts, and its arrays against model and clients, or raise ValueError.

    Moments are not looked at: those of another shape start anew (`OptimizerStep`).
    """
    _FACTS.validate_json(json.dumps(dict(snapshot.facts)), strict=True)
    if "base" not in snapshot.held:
        raise ValueError("held: expected the base among what clients hold, got none")
    scores = snapshot.facts["validation"]
    if scores is not None and not set(BUILT_IN) <= set(scores):
        raise ValueError(f"validation: expected {', '.join(BUILT_IN)}, got {', '.join(scores)}")
    if snapshot.history:
        _expect_names("history of clients", snapshot.history, ("examples", "losses", "rounds"))
    for name, known in snapshot.history.items():
        kind = "f" if name == "losses" else "i"
        _expect(f"history {name}", known, (population.clients,), kind)
    for kind, versions in snapshot.held.items():
        _expect(f"held {kind}", versions, (population.clients,), "i")
    shape, stacked = population.shape, RULES[recipe.aggregation.rule].restarts
    _check_state(snapshot.state, snapshot.facts["trainable"], shape, stacked)
    if snapshot.kept is not None:
        _check_state(snapshot.kept.state, snapshot.kept.trainable, shape, stacked)
    shapes = _own_shapes(snapshot, recipe)
    for client, own in snapshot.personal.items():
        if not 0 <= client < population.clients:
            last = population.clients - 1
            raise ValueError(f"own factors: expected clients 0 to {last}, got {client}")
        _expect_names(f"own factors of client {client}", own, shapes)
        for name, tensor in own.items():
            _expect(f"own {name} of client {client}", tensor, shapes[name], "f")
    _check_memory(snapshot, recipe, population.clients)


def _own_shapes(snapshot: Snapshot, recipe: Recipe) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of what each client keeps: all that it trains, or its B by module."""
    rule = RULES[recipe.aggregation.rule]
    if rule.alone:
        return trained_shapes(snapshot.state, rule.frozen(0))
    return {name: factors.b.shape for name, factors in snapshot.state.factors.items()}


def _check_state(state: AdapterState, trainable: str, shape: ModelShape, stacked: bool) -> None:
    """Check a model's arrays, or raise ValueError; `stacked`: whether rounds leave no factors."""
    adapter = trainable == "adapter"
    if not adapter and trainable != "full":
        raise ValueError(f"trainable: expected full or adapter, got {trainable!r}")
    modules = shape.modules if adapter else {}
    # Where all goes into the base there are none between two rounds.
    if state.factors or not stacked:
        _expect_names("factors", state.factors, modules)
    if adapter:
        _expect_names("tensors", state.dense, shape.head)
    values = sum(tensor.size for tensor in state.dense.values())
    expected = shape.head_params if adapter else shape.total_params
    if values != expected:
        raise ValueError(f"tensors: expected {expected} values in all, got {values}")
    for name, factors in state.factors.items():
        rank = factors.a.shape[0] if factors.a.ndim else 0
        _expect(f"A of {name}", factors.a, (rank, modules[name].d_in), "f")
        _expect(f"B of {name}", factors.b, (modules[name].d_out, rank), "f")


def _check_memory(snapshot: Snapshot, recipe: Recipe, clients: int) -> None:
    """Check what clients and server remember for the objective, or raise ValueError."""
    objective, rule = OBJECTIVES[recipe.clients.objective.name], RULES[recipe.aggregation.rule]
    adapter = snapshot.facts["trainable"] == "adapter"
    trained = trained_shapes(snapshot.state, rule.frozen(0) if adapter else None)
    # Zero-sized and frozen tensors are left out, and so is all before the first round.
    parts: list[tuple[str, Part, Arrays]] = [
        (f"memory of client {client}", "memory", own)
        for client, kept in snapshot.memory.items()
        if (own := of_objective(kept)) or not kept
    ]
    parts += [("shared arrays", "shared", snapshot.shared)] if snapshot.rounds > 0 else []
    for client, kept in snapshot.memory.items():
        for name, array in kept.items():
            _expect(f"memory of client {client}, {name}", array, array.shape, "f")
        if not 0 <= client < clients:
            raise ValueError(f"memory: expected clients 0 to {clients - 1}, got {client}")
    for what, part, arrays in parts:
        shapes = objective.shapes(part, trained)
        _expect_names(what, arrays, shapes)
        for name, array in arrays.items():
            _expect(f"{what}, {name}", array, tuple(shapes[name]), "f")


def _expect_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    if set(found) != set(expected):
        names = ", ".join(expected) or "nothing"
        raise ValueError(f"expected {what} of {names}, got {', '.join(found)}")


def _expect(name: str, array: Any, shape: tuple[int, ...], kind: str) -> None:
    if array.shape != shape or array.dtype.kind != kind:
        raise ValueError(f"{name}: expected shape {shape}, got {array.dtype} of {array.shape}")
