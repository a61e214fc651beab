"""Ray metrics of a run, for Prometheus and Grafana. Source: this project.

The process of the round loop sets all of them: a restarted client actor would begin a new series.
Prometheus calls a gauge `ray_rayfed_lora_<name>` and a counter `ray_rayfed_lora_<name>_total`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
from ray.util.metrics import Counter, Gauge, Histogram

from rayfed_lora.engines.usage import Usage
from rayfed_lora.federation.records import ClientRecord, RoundRecord
from rayfed_lora.runs.tables import round_row
from rayfed_lora.runs.trackers import Outcome
from rayfed_lora.types import Stage

# Columns of rounds.parquet, of the newest finished round; the rank of a full-model round is 0.
_ROUND_COLUMNS = {
    "round": "index of the newest finished round",
    "rank": "LoRA rank, mean over modules",
    "trainable_params": "values that a client trains",
    "proximal_weight": "mu of the proximal term",
    "learning_rate": "local learning rate",
    "clients": "size of the cohort",
    "train_loss": "mean training loss over clients",
    "eval_accuracy": "accuracy on the test split",
    "eval_loss": "loss on the test split, nats",
    "eval_macro_f1": "macro F1 on the test split",
    "eval_auc": "AUC on the test split, one class against the rest",
    "eval_perplexity": "perplexity on the test split",
    "validation_accuracy": "accuracy on the validation split",
    "validation_loss": "loss on the validation split, nats",
    "aggregation_error": "relative error of the aggregate",
    "temperature": "annealing temperature of the newest proposal",
    "simulated_s": "length of the round by the simulated clock",
}
_GAUGES = {
    **_ROUND_COLUMNS,
    "rounds": "rounds of the run",
    "client_updates_per_second": "usable client updates a second",
    "round_seconds": "wall time of the round",
    "aggregation_seconds": "time in which the server turned updates into the next state",
    "actors": "client actors",
    "actor_idle_share": "share of the client actors' time without a call",
}
_SUMMED = {
    "bytes_up": "bytes from clients",
    "bytes_down": "bytes to clients, base not included",
    "bytes_base": "bytes of frozen base to clients that did not hold it",
    "failed_clients": "clients that failed",
    "dropped_clients": "clients that left or came too late, by the simulated clock",
    "retried_blocks": "blocks trained again after an actor was lost",
}
_COUNTERS = {
    **_SUMMED,
    "client_updates": "usable client updates",
    "retried_clients": "clients trained again after an actor was lost",
    "actor_restarts": "client actors lost",
}
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# Ray drops a gauge that is not set within two of its reports, by default 20 s.
_REFRESH_S = 1.0
# Clients of a cohort that are observed, at most: an observation costs about 10 us.
_MOST_OBSERVED = 500


def run_metrics(name: str, rounds: int, usage: Callable[[], Usage]) -> RunMetrics | None:
    """Return the tracker of a run, as `RunMetrics`; None if this Ray does not collect metrics."""
    collects = os.environ.get("RAY_enable_metrics_collection", "1").lower() in ("1", "true")
    return RunMetrics(name, rounds, usage) if collects else None


class RunMetrics:
    """A tracker that sets metrics with the run's name as tag; they stay visible until `close`."""

    def __init__(self, name: str, rounds: int, usage: Callable[[], Usage]) -> None:
        """Declare the metrics; `usage` returns the engine's usage, called after each round."""
        self._usage = usage
        self._used, self._used_at = Usage(0, 0.0, 0, 0), time.perf_counter()

        def declared(kind: Any, key: str, text: str, *options: Any) -> Any:
            return kind(f"rayfed_lora_{key}", text, *options).set_default_tags({"run": name})

        run = ("run",)
        self._gauges = {key: declared(Gauge, key, text, run) for key, text in _GAUGES.items()}
        self._counters = {key: declared(Counter, key, text, run) for key, text in _COUNTERS.items()}
        text = "1 for the stage of the newest finished round"
        self._stage = declared(Gauge, "stage", text, ("run", "stage"))
        text = "local training time"
        self._client_seconds = declared(Histogram, "client_seconds", text, list(_SECONDS), run)
        self._stages = dict.fromkeys(get_args(Stage), 0)
        self._values: dict[str, float] = {"rounds": rounds}
        self._closed = threading.Event()

    def resumed(self, rounds: pa.Table) -> None:
        """Start the counters at the sums over the rounds of earlier sessions."""
        threading.Thread(target=self._refresh, name="metrics", daemon=True).start()
        sums = {key: pc.sum(rounds[key]).as_py() or 0 for key in ("clients", *_SUMMED)}
        self._count_round(sums)
        self._used_at = time.perf_counter()

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Set the metrics to a finished round."""
        row = round_row(record) | {"rank": record.rank or 0.0}
        updates = self._count_round(row)
        times = [client.seconds for client in clients if client.status == "ok"]
        for seconds in times[:: len(times) // _MOST_OBSERVED + 1]:
            self._client_seconds.observe(seconds)
        self._stages = {stage: int(stage == record.stage) for stage in self._stages}
        # A value that this round did not measure, e.g. a test score, stays as it was.
        self._values = {
            **self._values,
            **{key: row[key] for key in _ROUND_COLUMNS if row[key] is not None},
            "client_updates_per_second": updates / record.seconds,
            "round_seconds": record.seconds,
            "aggregation_seconds": aggregation_s,
            **self._utilisation(record.seconds),
        }
        self._show()

    def _utilisation(self, seconds: float) -> dict[str, float]:
        before, now = self._used, self._usage()
        self._count("actor_restarts", now.losses - before.losses)
        self._count("retried_clients", now.retried_clients - before.retried_clients)
        passed_s = time.perf_counter() - self._used_at
        if passed_s < seconds / 2:
            # The last rounds finish right after one another.
            self._used = replace(now, busy_s=before.busy_s)
            return {"actors": now.actors}
        self._used, self._used_at = now, self._used_at + passed_s
        busy = (now.busy_s - before.busy_s) / (now.actors * now.at_once * passed_s)
        # Negative if a call that began before this round ended in it.
        return {"actors": now.actors, "actor_idle_share": max(0.0, 1.0 - busy)}

    def _show(self) -> None:
        # Both mappings are replaced, never mutated: another thread may be reading them.
        for key, value in self._values.items():
            self._gauges[key].set(value)
        if "round" in self._values:
            for stage, is_now in self._stages.items():
                self._stage.set(is_now, {"stage": stage})

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_S):
            self._show()

    def _count_round(self, row: Mapping[str, Any]) -> int:
        """Count a row, or the sums over several rows; return the number of usable updates."""
        for key in _SUMMED:
            self._count(key, row[key])
        updates: int = row["clients"] - row["failed_clients"] - row["dropped_clients"]
        self._count("client_updates", updates)
        return updates

    def _count(self, key: str, more: int) -> None:
        if more > 0:
            self._counters[key].inc(more)

    def close(self, outcome: Outcome) -> None:
        """Stop setting the gauges, so that Ray drops them."""
        del outcome
        self._closed.set()
