"""Whether own methods keep runs equal: the same work, divided in other ways.

Source: this project.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from rayfed_lora.data.memory import as_held, digest_of, source_of
from rayfed_lora.engines.factory import TorchFactory
from rayfed_lora.errors import PluginError
from rayfed_lora.launching.this_process import local_engine
from rayfed_lora.plugins import tables  # noqa: F401 - makes the tables
from rayfed_lora.plugins.modules import permit, settings_of
from rayfed_lora.plugins.registry import KEYS, TABLES, Method
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder

# Small, and yet with a round of each stage, clients of different sizes and several blocks.
_BASE: Mapping[str, Any] = {
    "data.partition.clients": 12,
    "data.max_examples": 240,
    "clients.per_round": 6,
    "clients.local_steps": 2,
    "clients.batch_size": 8,
    "annealing.initiating.rounds": 1,
    "annealing.heating.rounds": 1,
    "annealing.cooling.rounds": 2,
    "annealing.holding.rounds": 0,
    "annealing.heating.rank": 4,
    "annealing.cooling.rank": 2,
    "runtime.executor": "local",
    "runtime.client_actors": 1,
    "runtime.cohort_size": 3,
}
# Blocks of another size are summed in another order.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Check:
    """What was found of one method.

    Attributes:
        method: that was checked.
        outcomes: by way of running, `equal` or in what it differs.
    """

    method: Method[Any]
    outcomes: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether all ways gave the same."""
        return all(outcome.startswith("equal") for outcome in self.outcomes.values())


def check_plugin(module: str) -> list[Check]:
    """Run each method of a module on a small recipe in several ways, and compare the results.

    One trainer twice, two trainers, and a stop and resume after half of the rounds have to give
    the same bits; blocks of another size, the same up to rounding. Data sets are read twice.

    Raises:
        PluginError: the module cannot be imported, or has no method that a recipe can name.
        RunError: a method failed.
    """
    permit([module])
    found = [m for table in TABLES.values() for m in table.methods() if m.module == module]
    checked = [method for method in found if method.kind in KEYS or method.kind == "metric"]
    if not checked:
        raise PluginError(
            f"plug-in {module!r}: expected functions or classes decorated by rayfed_lora.plugins,"
            " got none"
        )
    return [Check(method, dict(_outcomes(method, module))) for method in checked]


def _outcomes(method: Method[Any], module: str) -> Iterator[tuple[str, str]]:
    if method.kind == "data":
        # The recipe below is for images of one size: rows are only read.
        once, again = (digest_of(as_held(method.value.rows(seed=0))) for _ in range(2))
        yield "read again", "equal" if once == again else f"SHA-256 {again} in place of {once}"
        return
    if method.kind == "metric":
        own: Mapping[str, Any] = {"evaluation.metrics": [method.name]}
    else:
        own = settings_of(method, {})
    mode = {"annealing.mode": "fixed"} if method.kind == "objective" else {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if method.kind == "model" and method.value.task != "image-classification":
            mode = _texts(place, method)
        recipe = load_recipe("digits-vit", {**_BASE, **mode, **own}, plugins=[module])
        first, weights = _run(recipe, place / "once")
        for way, other in (
            ("one trainer again", _run(recipe, place / "again")),
            ("two trainers", _run(_changed(recipe, client_actors=2), place / "two")),
            ("stop and resume", _run(recipe, place / "resumed", stop_after=2)),
        ):
            yield way, "equal" if other[0] == first else f"SHA-256 {other[0]} in place of {first}"
        _, blocks = _run(_changed(recipe, cohort_size=2), place / "blocks")
        apart = max((_distance(blocks[n], w) for n, w in weights.items()), default=0.0)
        equal = f"equal up to rounding ({apart:.1e})"
        yield "smaller blocks", equal if apart <= _ROUNDING else f"weights {apart:.1e} apart"


def _changed(recipe: Recipe, **runtime: Any) -> Recipe:
    return load_recipe(recipe, {f"runtime.{key}": value for key, value in runtime.items()})


def _texts(folder: Path, method: Method[Any]) -> dict[str, Any]:
    """Return a recipe's values for texts of drawn words, with a tokenizer of these in a folder."""
    # Here, as it imports transformers.
    from rayfed_lora.models.word_tokenizer import write_word_tokenizer

    words = [f"w{i}" for i in range(20)]
    write_word_tokenizer(folder / "tokenizer", words)
    drawn = np.random.default_rng(0).integers(len(words), size=(300, 8))
    rows = [{"text": " ".join(words[i] for i in row), "label": int(row[0] % 2)} for row in drawn]
    return {
        "data.source": source_of(rows),
        "data.max_length": 8,
        "model.task": method.value.task,
        "model.tokenizer": str(folder / "tokenizer"),
        "adapter.train_head": method.value.task != "causal-lm",
    }


def _distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Return the relative distance of two tensors."""
    return float(np.linalg.norm(one - other) / (np.linalg.norm(other) + 1e-30))


def _run(
    recipe: Recipe, folder: Path, stop_after: int | None = None
) -> tuple[str, dict[str, npt.NDArray[Any]]]:
    """Run, with a stop in between where asked for; return the SHA-256 and the adapter's weights."""
    place = RunFolder(str(folder))
    if stop_after is not None:
        rounds = _rounds(recipe, place, resume=False)
        for done, _ in enumerate(rounds, start=1):
            if done == stop_after:
                break
        rounds.close()
    rounds = _rounds(recipe, place, resume=stop_after is not None)
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            summary: dict[str, Any] = end.value
            break
    weights = load(place.read("adapter/adapter_model.safetensors"))
    return str(summary["adapter_sha256"]), weights


def _rounds(recipe: Recipe, place: RunFolder, *, resume: bool) -> Any:
    engine = local_engine(recipe, TorchFactory(), "cpu")
    board = StatusBoard(recipe.annealing.total_rounds)
    return simulate_rounds(recipe, engine, place, board, lambda: False, resume=resume)
