"""Trackers: observers of finished rounds, beside tables and status.

Those that draw curves (TensorBoard, Weights & Biases, MLflow) are imported only where a recipe asks
for them. Their own environment variables give addresses and keys of servers.

Source: this project.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import pyarrow as pa

from rayfed_lora.errors import BadInputError, InterruptedRunError, RunError, RunFolderError
from rayfed_lora.federation.records import ClientRecord, RoundRecord
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.checksums import sha256
from rayfed_lora.runs.seals import damaged
from rayfed_lora.runs.tables import round_row
from rayfed_lora.storage import RunFolder

Outcome = Literal["done", "stopped", "failed"]
# Ids of the W&B and MLflow runs that a resumed run continues.
TRACKING_FILE = "tracking.json"
EVENTS_FOLDER = "tensorboard"
# Longest time between two writes of events, and between two uploads to remote storage.
_FLUSH_S = 5
_UPLOAD_S = 30.0


class Tracker(Protocol):
    """Receives the finished rounds of a run."""

    def resumed(self, rounds: pa.Table) -> None:
        """Take the rows of rounds.parquet of earlier processes of the run; called first, once."""
        ...

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Take a finished round, its cohort's records, and the seconds of the aggregation."""
        ...

    def close(self, outcome: Outcome) -> None:
        """End the records of this process."""
        ...


@dataclass
class Tracking:
    """The trackers of a run; one that fails is dropped with a note, and the run continues."""

    trackers: list[Tracker]
    note: Callable[[str], None]

    def resumed(self, rounds: pa.Table) -> None:
        """Call `resumed` of all trackers."""
        self._for_each(lambda tracker: tracker.resumed(rounds))

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Call `round_done` of all trackers."""
        self._for_each(lambda tracker: tracker.round_done(record, clients, aggregation_s))

    @contextmanager
    def told_of_the_end(self) -> Iterator[None]:
        """Call `close` of all trackers with how the block ended, and drop them."""
        outcome: Outcome = "failed"
        try:
            yield
            outcome = "done"
        except (InterruptedRunError, GeneratorExit):
            outcome = "stopped"
            raise
        finally:
            self._for_each(lambda tracker: tracker.close(outcome))
            self.trackers = []

    def _for_each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # a failure of a tracker must not end the run
                self.trackers.remove(tracker)
                self.note(f"{type(tracker).__name__} failed and gets no more rounds: {error}")


def check_tracking(recipe: Recipe) -> None:
    """Raise a BadInputError unless the trackers that a recipe asks for are installed."""
    wanted = [name for name, value in recipe.tracking.model_dump().items() if value]
    missing = [
        f"tracking.{name}: expected the Python package {name} to be installed, it is not;"
        f" pip install 'rayfed-lora[{name}]'"
        for name in wanted
        if find_spec(name) is None
    ]
    if missing:
        raise BadInputError("\n".join(missing))


def trackers(recipe: Recipe, folder: RunFolder, name: str) -> Iterator[Tracker]:
    """Start and yield the trackers that a recipe asks for, one by one.

    `folder` contains the recipe; `name` is displayed. Raises RunError where one cannot start, e.g.
    without a key.
    """
    asked = recipe.tracking
    project, experiment = asked.wandb, asked.mlflow
    if asked.tensorboard:
        yield _started("tensorboard", lambda: TensorBoard(folder))
    if project is not None:
        yield _started("wandb", lambda: WandB(project, recipe, folder, name))
    if experiment is not None:
        yield _started("mlflow", lambda: MLflow(experiment, recipe, folder, name))


def _started(name: str, make: Callable[[], Tracker]) -> Tracker:
    try:
        return make()
    except RunFolderError:
        raise
    except Exception as error:
        raise RunError(f"tracking.{name}: {error}") from error


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric columns of a row of rounds.parquet, but for the round."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and name != "round"
    }


def _values(record: RoundRecord, aggregation_s: float) -> dict[str, float]:
    return scalars(round_row(record)) | {"aggregation_seconds": aggregation_s}


class TensorBoard:
    """Event files in the run folder; on remote storage they are uploaded every half minute.

    A resumed run writes its earlier rounds anew: rounds that will be run again cannot be removed
    from an event file.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Replace the files of earlier processes of the run."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.remove(EVENTS_FOLDER)
        self._folder = folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if folder.local is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="rayfed-lora-tensorboard-")
            self._where = Path(self._scratch.name)
        else:
            self._where = folder.local / EVENTS_FOLDER
        self._writer = EventFileWriter(str(self._where), flush_secs=_FLUSH_S)
        self._uploaded = time.monotonic()

    def resumed(self, rounds: pa.Table) -> None:
        """Write the earlier rounds."""
        for row in rounds.to_pylist():
            self._write(row["round"], scalars(row))

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Write a round, step = round."""
        self._write(record.round, _values(record, aggregation_s))
        if self._scratch is not None and time.monotonic() - self._uploaded > _UPLOAD_S:
            self._writer.flush()
            self._upload()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=found))
        )

    def _upload(self) -> None:
        for path in self._where.iterdir():
            self._folder.write(f"{EVENTS_FOLDER}/{path.name}", path.read_bytes())
        self._uploaded = time.monotonic()

    def close(self, outcome: Outcome) -> None:
        """Write all pending events."""
        self._writer.close()
        if self._scratch is not None:
            self._upload()
            self._scratch.cleanup()


class WandB:
    """A run of Weights & Biases; a resumed run continues it."""

    def __init__(self, project: str, recipe: Recipe, folder: RunFolder, name: str) -> None:
        """Start a run, or continue that of the folder; WANDB_MODE=offline needs no server."""
        import wandb

        known = _run_ids(folder).get("wandb")
        self._run = wandb.init(
            project=project,
            id=known,
            resume="allow",
            name=name,
            config=_config(recipe),
            dir=None if folder.local is None else str(folder.local),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        self._new = known is None
        _store_run_id(folder, "wandb", self._run.id)

    def resumed(self, rounds: pa.Table) -> None:
        """Send the earlier rounds, unless the earlier processes have sent them."""
        if self._new:
            for row in rounds.to_pylist():
                self._run.log(scalars(row), step=row["round"])

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Send a round, step = round; W&B ignores a round that it has."""
        self._run.log(_values(record, aggregation_s), step=record.round)

    def close(self, outcome: Outcome) -> None:
        """End the run; one that is not done counts as crashed, and can be continued."""
        self._run.finish(exit_code=0 if outcome == "done" else 1)


class MLflow:
    """A run of an MLflow experiment; a resumed run continues it."""

    _STATUS: ClassVar = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, experiment: str, recipe: Recipe, folder: RunFolder, name: str) -> None:
        """Start a run at MLFLOW_TRACKING_URI, or continue that of the folder."""
        import pandas as pd
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        known = _run_ids(folder).get("mlflow")
        self._next = 0
        if known is None:
            found = self._client.get_experiment_by_name(experiment)
            where = found.experiment_id if found else self._client.create_experiment(experiment)
            self._id = self._client.create_run(where, run_name=name).info.run_id
            config = pd.json_normalize(_config(recipe)).iloc[0]
            params = [Param(str(key), str(value)) for key, value in config.items()]
            for i in range(0, len(params), 100):
                self._client.log_batch(self._id, params=params[i : i + 100])
            _store_run_id(folder, "mlflow", self._id)
        else:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            metrics = self._client.get_run(known).data.metrics
            self._next = int(metrics.get("round", -1)) + 1

    def resumed(self, rounds: pa.Table) -> None:
        """Send the earlier rounds that MLflow does not have."""
        for row in rounds.to_pylist():
            self._send(row["round"], scalars(row))

    def round_done(
        self, record: RoundRecord, clients: Sequence[ClientRecord], aggregation_s: float
    ) -> None:
        """Send a round, step = round, unless MLflow has it."""
        self._send(record.round, _values(record, aggregation_s))

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if step < self._next:
            return
        now = int(time.time() * 1000)
        found = [Metric(k, v, now, step) for k, v in {**values, "round": float(step)}.items()]
        self._client.log_batch(self._id, metrics=found)
        self._next = step + 1

    def close(self, outcome: Outcome) -> None:
        """End the run."""
        self._client.set_terminated(self._id, self._STATUS[outcome])


def _config(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that trackers show: all but storage and trackers."""
    return recipe.model_dump(mode="json", exclude={"storage", "tracking"})


def _run_ids(folder: RunFolder) -> dict[str, str]:
    if not folder.exists(TRACKING_FILE):
        return {}
    try:
        found: dict[str, str] = json.loads(folder.read(TRACKING_FILE))
        seal = found.pop("sha256", None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(folder, TRACKING_FILE, str(error)) from None
    if seal != _seal(found):
        raise damaged(folder, TRACKING_FILE, "its values do not match its checksum")
    return found


def _seal(runs: Mapping[str, str]) -> str:
    return sha256(json.dumps(runs, sort_keys=True).encode())


def _store_run_id(folder: RunFolder, name: str, run_id: str) -> None:
    runs = {**_run_ids(folder), name: run_id}
    content = json.dumps({**runs, "sha256": _seal(runs)}, indent=1)
    folder.write(TRACKING_FILE, content.encode())
