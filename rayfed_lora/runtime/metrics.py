"""A run's figures in Ray's metrics, for Prometheus and Grafana. Source: this project.

They are kept in the process of the round loop: a client actor that is started again would begin a
new series. Prometheus knows them as `ray_rayfed_lora_<name>`, counters with `_total` after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc
from ray.util.metrics import Counter, Gauge, Histogram

from rayfed_lora.reporting.tables import round_row
from rayfed_lora.reporting.tracking import Outcome
from rayfed_lora.types import ClientRecord, RoundRecord, Stage

# Of the newest finished round, as in rounds.parquet; the rank of a full-model round is 0.
_OF_ROW = {
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
    **_OF_ROW,
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
# An observation costs some 10 us: of a large cohort only so many clients are observed.
_MOST_OBSERVED = 500


@dataclass(frozen=True)
class Usage:
    """What the client actors of a run have done since they were opened.

    Attributes:
        actors: how many there are.
        busy_s: seconds in which they trained or tested, summed.
        losses: how often one of them was lost.
        retried_clients: clients whose training was begun again because of that.
    """

    actors: int
    busy_s: float
    losses: int
    retried_clients: int


class RunMetrics:
    """Follows a run; its metrics are tagged with the run's name."""

    def __init__(self, name: str, rounds: int, usage: Callable[[], Usage]) -> None:
        """Declare the metrics.

        Args:
            name: of the run.
            rounds: number of its rounds.
            usage: asked after each round.
        """
        self._usage = usage
        self._seen = Usage(0, 0.0, 0, 0)
        run = {"run": name}
        self._gauges = {
            key: Gauge(f"rayfed_lora_{key}", text, ("run",)).set_default_tags(run)
            for key, text in _GAUGES.items()
        }
        self._counters = {
            key: Counter(f"rayfed_lora_{key}", text, ("run",)).set_default_tags(run)
            for key, text in _COUNTERS.items()
        }
        self._stage = Gauge(
            "rayfed_lora_stage", "1 for the stage of the newest finished round", ("run", "stage")
        ).set_default_tags(run)
        self._client_seconds = Histogram(
            "rayfed_lora_client_seconds", "local training time", list(_SECONDS), ("run",)
        ).set_default_tags(run)
        self._gauges["rounds"].set(rounds)

    def resumed(self, rounds: pa.Table) -> None:
        """Let the counters begin with what earlier sittings counted."""
        for key in _SUMMED:
            self._count(key, pc.sum(rounds[key]).as_py() or 0)
        clients, failed = (
            pc.sum(rounds[key]).as_py() or 0 for key in ("clients", "failed_clients")
        )
        self._count("client_updates", clients - failed)

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Set everything to a finished round."""
        row = round_row(record) | {"rank": record.rank or 0.0}
        for key in _OF_ROW:
            self._gauges[key].set(row[key])
        for key in _SUMMED:
            self._count(key, row[key])
        for stage in get_args(Stage):
            self._stage.set(int(stage == record.stage), {"stage": stage})
        updates = record.clients - record.failed_clients - record.dropped_clients
        self._count("client_updates", updates)
        self._gauges["client_updates_per_second"].set(updates / record.seconds)
        self._gauges["round_seconds"].set(record.seconds)
        self._gauges["aggregation_seconds"].set(aggregation_s)
        times = [client.seconds for client in clients if client.status == "ok"]
        for seconds in times[:: len(times) // _MOST_OBSERVED + 1]:
            self._client_seconds.observe(seconds)
        self._use(record.seconds)

    def _use(self, seconds: float) -> None:
        before, now = self._seen, self._usage()
        self._seen = now
        self._count("actor_restarts", now.losses - before.losses)
        self._count("retried_clients", now.retried_clients - before.retried_clients)
        busy = (now.busy_s - before.busy_s) / (now.actors * seconds)
        self._gauges["actors"].set(now.actors)
        # A round's first blocks may have been trained while the one before it was tested.
        self._gauges["actor_idle_share"].set(max(0.0, 1.0 - busy))

    def _count(self, key: str, more: int) -> None:
        if more > 0:
            self._counters[key].inc(more)

    def close(self, outcome: Outcome) -> None:
        """Leave the last values; they go with the process."""
        del outcome
