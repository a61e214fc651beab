"""What a run writes into its folder (docs/design.md, "The run folder"). Source: this project."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rayfed_lora.errors import ClientError, InterruptedRunError
from rayfed_lora.federation.generation import scored
from rayfed_lora.federation.ledger import Ledger
from rayfed_lora.federation.model_tests import answering
from rayfed_lora.federation.run import Run, Timing, fresh
from rayfed_lora.lora.states import sha256
from rayfed_lora.printable import client_label
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints, checksums
from rayfed_lora.runs.checkpoints import CheckpointWriter, Snapshot
from rayfed_lora.runs.checksums import REPORT_FILE, SUMMARY_FILE
from rayfed_lora.runs.model_card import (
    ADAPTER_FILES,
    CARD_FILE,
    describe_adapter,
    describe_model,
)
from rayfed_lora.runs.restored import run_of, snapshot
from rayfed_lora.runs.round_adapters import is_due, keep_adapter, kept_sums
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.runs.summary import client_summary, data_summary, selection_summary, summary
from rayfed_lora.runs.tables import PARTITION_FILE, Tables
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.engine import Engine, Population
from rayfed_lora.tasks.messages import Export

_NONE_KEPT = (
    "evaluation.keep_best: no test on the validation split gave a finite {}; the model of the last"
    " round is exported"
)
# Makes a run's page from its folder and its summary.
PageWriter = Callable[[RunFolder, Mapping[str, Any]], str]


@dataclass
class Saving:
    """Saves a run's tables and checkpoints, and what it ends with.

    `began` is `time.perf_counter()` at which this process began with the run.
    """

    recipe: Recipe
    folder: RunFolder
    population: Population
    tables: Tables
    ledger: Ledger
    began: float
    # Wall time of earlier processes, and number of rounds that are saved.
    _wall_s: float = field(default=0.0, init=False)
    _saved: int = field(default=0, init=False)
    _run: Run = field(init=False)
    _checkpoints: CheckpointWriter = field(init=False)
    _engine: Engine = field(init=False)

    def begin(self, found: Snapshot | None, engine: Engine) -> Run:
        """Return the run before its next round, and bring the tables to it."""
        self._engine = engine
        self._checkpoints = CheckpointWriter(self.folder, self.recipe.storage.keep)
        if found is None:
            self.tables.begin()
            run = fresh(self.recipe, engine, self.population)
        else:
            run = run_of(found, self.ledger)
            checkpoints.remove_later(self.folder, run.rounds)
            self.tables.restore(run.rounds, found.facts["tables"])
        self._wall_s, self._saved = run.timing.wall_s, run.rounds
        startup_s = run.timing.startup_s + time.perf_counter() - self.began
        self._run = replace(run, timing=replace(run.timing, startup_s=startup_s))
        return self._run

    @contextmanager
    def on_stop(self) -> Iterator[None]:
        """Save the newest run where the rounds are stopped, and say how to go on.

        A ClientError gets the client's name.
        """
        try:
            yield
        except ClientError as error:
            name = client_label(error.client, self.population.client_names)
            raise ClientError(error.client, error.round_index, error.trace, name) from error
        except GeneratorExit:
            self.save()
            raise
        except InterruptedRunError as stop:
            run = self.save()
            raise InterruptedRunError(
                f"stopped with {run.rounds} of {self.recipe.annealing.total_rounds} rounds done,"
                f" kept in {self.folder.location}; --resume continues"
            ) from stop

    def offer(self, run: Run) -> None:
        """Take the run after one more round, and save it, or its adapter, where that is due."""
        self._run = run
        if is_due(self.recipe, run):
            last = self.tables.rounds.slice(run.rounds - 1).to_pylist()[0]
            labels = list(self.population.label_names)
            facts = {"final": last, "rounds": run.rounds, "labels": labels}
            keep_adapter(self.folder, self.recipe, self._engine, run, facts)
        if run.rounds % self.recipe.storage.checkpoint_every == 0:
            self.save()

    def save(self) -> Run:
        """Save the rounds that are not yet saved, and return the newest run.

        Tables go first: a checkpoint never knows of a round that they lack. A checkpoint is never
        written a second time.
        """
        run = self._run
        if run.rounds != self._saved:
            self.tables.save()
            rows, data = self.tables.rows(run.rounds), self.population.fingerprint
            self._checkpoints.write(snapshot(run, self.ledger, self._timing(run), rows, data))
            self._saved = run.rounds
        return run

    def _timing(self, run: Run) -> Timing:
        """Return the seconds so far, the wall time up to now."""
        return replace(run.timing, wall_s=self._wall_s + time.perf_counter() - self.began)

    def _answers(self, run: Run, engine: Engine) -> dict[str, Any]:
        """Return `generation`: scores of the exported model's answers and of the base's, if asked.

        `run` is the saved one.
        """
        settings, facts = self.recipe.evaluation.generate, self.population.prompts
        if settings is None or facts is None:
            return {}
        found = [] if run.selection.kept else self.tables.last_answers(run.rounds - 1)
        if not found:
            found = [*answering(self.recipe, engine, self.population, run.result).result()]
        result = scored(found, facts)
        if settings.base:
            first = fresh(self.recipe, engine, self.population).model
            base = answering(self.recipe, engine, self.population, first).result()
            result["base"] = scored(base, facts)
        return {"generation": result}

    def finish(self, engine: Engine, board: StatusBoard, page: PageWriter | None) -> dict[str, Any]:
        """Export the model, close the engine and write the summary, which is returned.

        `page` writes report.html; None: no page.
        """
        run = self.save()
        board.phase("exporting")
        folder, tables, model = self.folder, self.tables, run.result
        answers = self._answers(run, engine)
        exported = engine.submit(Export(model)).result()
        # What follows needs no actors, and their memory may be others'.
        engine.close()
        digest = sha256(model.state, model.base)
        totals, timing = self.ledger.totals, self._timing(run)
        clients = self.population.clients
        result = summary(self.recipe, tables.rounds, totals, timing, digest, clients)
        result |= data_summary(self.population.fingerprint)
        tests = tables.last_tests(run.rounds - 1)
        if tests.num_rows > 0:
            result["clients"] = client_summary(tests)
        result |= answers
        result |= selection_summary(self.recipe, tables.rounds, run.selection)
        if self.recipe.evaluation.keep_best is not None and run.selection.kept is None:
            board.note(_NONE_KEPT.format(self.recipe.evaluation.keep_best))
        result["labels"] = list(self.population.label_names)
        exported = _described(exported, folder.local or Path(), self.recipe, result)
        for name, content in exported.items():
            folder.write(name, content)
        if page is not None:
            with optional_page(folder, board.note):
                folder.write(REPORT_FILE, page(folder, result).encode())
        result[checksums.CHECKSUMS_KEY] = checksums.SUMS_FILE
        result[checksums.FORMAT_KEY] = checksums.FORMAT
        content = json.dumps(_finite(result), indent=1, allow_nan=False).encode()
        recipe = folder.read("recipe.yaml")
        contents = {**exported, SUMMARY_FILE: content, "recipe.yaml": recipe}
        sums = {name: checksums.sha256(content) for name, content in contents.items()}
        sums |= dict(kept_sums(folder))
        for name in (*tables.rows(run.rounds), PARTITION_FILE):
            if name != PARTITION_FILE or folder.exists(name):
                sums[name] = checksums.table_sha256(folder, name)
        checksums.write(folder, sums)
        # Last: a folder with a summary is a finished run.
        folder.write(SUMMARY_FILE, content)
        board.phase("done")
        return result


def _described(
    exported: Mapping[str, bytes], root: Path, recipe: Recipe, result: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return an exported model with its card, its parts in folders of `root`."""
    files, own_base = dict(exported), "base/config.json" in exported
    config = f"adapter/{ADAPTER_FILES[0]}"
    names = [name.partition("/")[2] for name in files]
    if config in files:
        base = root / "base" if own_base else None
        made = describe_adapter(files[config], root / "adapter", base, names, recipe, result)
        files |= {f"adapter/{name}": content for name, content in made.items()}
    elif own_base:
        files[f"base/{CARD_FILE}"] = describe_model(root / "base", names, recipe, result)
    return files


def _finite(value: Any) -> Any:
    """Return JSON values with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def optional_page(folder: RunFolder, tell: Callable[[str], None]) -> Iterator[None]:
    """Turn any error of the block into a note: the runs are done, and a page can be made again."""
    try:
        yield
    except Exception as error:
        where = shlex.quote(folder.location)
        tell(f"no {REPORT_FILE} ({error}); to make one: rayfed-lora report {where}")
