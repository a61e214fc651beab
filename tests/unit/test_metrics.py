"""What a run's Ray metrics are set to; that Prometheus gets them is in `tests/e2e`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayfed_lora.engines.usage import Usage
from rayfed_lora.errors import InterruptedRunError
from rayfed_lora.federation.records import ClientRecord, RoundRecord
from rayfed_lora.launching import ray_metrics
from rayfed_lora.launching.ray_metrics import RunMetrics, run_metrics
from rayfed_lora.runs.checked import table
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from tests.fakes import Behaviour, local_engine, make_recipe

Tags = tuple[tuple[str, str], ...]


@dataclass
class Kept:
    """What was recorded, by metric and tags: the newest value, the sum, all values."""

    gauges: dict[tuple[str, Tags], float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    observed: dict[str, list[float]] = field(default_factory=dict)

    def gauge(self, name: str, **tags: str) -> float | None:
        key = (f"rayfed_lora_{name}", tuple(sorted({"run": "a", **tags}.items())))
        return self.gauges.get(key)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    found = Kept()

    class Metric:
        def __init__(self, name: str, text: str, *rest: Any) -> None:
            self._name, self._tags = name, {}

        def set_default_tags(self, tags: dict[str, str]) -> Metric:
            self._tags = tags
            return self

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert isinstance(value, (int, float))
            found.gauges[self._name, tuple(sorted((self._tags | (tags or {})).items()))] = value

        def inc(self, value: float) -> None:
            assert value > 0  # as Ray has it
            found.counters[self._name] = found.counters.get(self._name, 0) + value

        def observe(self, value: float) -> None:
            found.observed.setdefault(self._name, []).append(value)

    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, Metric)
    return found


def run(
    location: Path, usage: Usage, stop_after: int = 99, behaviour: Behaviour | None = None
) -> pd.DataFrame:
    recipe = make_recipe()
    board, folder = StatusBoard(6), RunFolder(location)
    simulate(
        recipe,
        local_engine(recipe, behaviour),
        folder,
        board,
        lambda: board.status().rounds_done >= stop_after,
        resume=folder.exists("recipe.yaml"),
        metrics=RunMetrics("a", 6, lambda: usage),
    )
    return pd.read_parquet(location / "rounds.parquet")


def test_the_metrics_are_those_of_the_newest_round(kept, tmp_path):
    rounds = run(tmp_path, Usage(1, 0.0, 0, 0))
    last = rounds.iloc[-1]
    for name in ("round", "rank", "train_loss", "eval_accuracy", "learning_rate", "clients"):
        assert kept.gauge(name) == last[name]
    assert kept.gauge("rounds") == 6
    assert kept.gauge("round_seconds") == last["seconds"]
    assert kept.gauge("client_updates_per_second") == 3 / last["seconds"]
    assert kept.gauge("stage", stage="holding") == 1
    assert kept.gauge("stage", stage="cooling") == 0
    assert kept.gauge("validation_loss") is None
    for name in ("bytes_up", "bytes_down", "bytes_base"):
        assert kept.counters[f"rayfed_lora_{name}"] == rounds[name].sum()
    assert kept.counters["rayfed_lora_client_updates"] == 6 * 3
    assert len(kept.observed["rayfed_lora_client_seconds"]) == 6 * 3


def test_counters_of_a_run_that_goes_on_begin_with_what_was_counted(kept, tmp_path):
    failing = Behaviour(failing=frozenset((0, t) for t in range(6)))
    with pytest.raises(InterruptedRunError):
        run(tmp_path, Usage(1, 0.0, 0, 0), stop_after=3, behaviour=failing)
    # A new process has new counters.
    kept.counters.clear()
    rounds = run(tmp_path, Usage(1, 0.0, 0, 0), behaviour=failing)
    failed = rounds["failed_clients"].sum()
    assert failed > 0
    assert kept.counters["rayfed_lora_bytes_up"] == rounds["bytes_up"].sum()
    assert kept.counters["rayfed_lora_failed_clients"] == failed
    assert kept.counters["rayfed_lora_client_updates"] == 6 * 3 - failed


def test_lost_actors_are_counted_once_and_a_busy_actor_is_not_idle(kept, tmp_path):
    # The same usage after each round: after the first one there is nothing new.
    run(tmp_path, Usage(actors=2, busy_s=1e9, losses=2, retried_clients=5))
    assert kept.counters["rayfed_lora_actor_restarts"] == 2
    assert kept.counters["rayfed_lora_retried_clients"] == 5
    assert kept.gauge("actors") == 2
    assert kept.gauge("actor_idle_share") == 1.0


def test_of_a_large_cohort_some_clients_are_observed(kept):
    follower = RunMetrics("a", 6, lambda: Usage(1, 0.0, 0, 0))
    clients = [ClientRecord(0, k, 1, 0.5, "ok", None, 1, 1, float(k)) for k in range(100_000)]
    numbers: dict[str, Any] = {column.name: 1 for column in fields(RoundRecord)}
    record = RoundRecord(
        **{**numbers, "stage": "heating", "ranks": None, "proposal": None, "evaluation": {}}
    )
    began = time.perf_counter()
    follower.round_done(record, clients, 0.0)
    assert time.perf_counter() - began < 1.0
    seconds = kept.observed["rayfed_lora_client_seconds"]
    # Every 201st of 100,000.
    assert seconds == [float(k) for k in range(0, 100_000, 201)]


def test_gauges_are_set_again_until_the_run_is_closed(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_metrics, "_REFRESH_S", 0.01)
    run(tmp_path, Usage(1, 0.0, 0, 0))
    follower = RunMetrics("a", 6, lambda: Usage(1, 0.0, 0, 0))
    follower.resumed(table(RunFolder(tmp_path), "rounds.parquet"))
    kept.gauges.clear()
    deadline = time.monotonic() + 10
    while kept.gauge("rounds") is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    follower.close("done")
    time.sleep(0.1)
    kept.gauges.clear()
    time.sleep(0.1)
    assert kept.gauges == {}


@pytest.mark.parametrize(("collects", "follows"), [(None, True), ("1", True), ("0", False)])
def test_nothing_is_recorded_where_ray_collects_nothing(kept, monkeypatch, collects, follows):
    if collects is None:
        monkeypatch.delenv("RAY_enable_metrics_collection", raising=False)
    else:
        monkeypatch.setenv("RAY_enable_metrics_collection", collects)
    follower = run_metrics("a", 6, lambda: Usage(1, 0.0, 0, 0))
    assert isinstance(follower, RunMetrics) is follows
