"""A finished run, as Python sees it. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rayfed_lora.errors import RunFolderError
from rayfed_lora.runs.checksums import SUMMARY_FILE, read_summary
from rayfed_lora.runs.client_rows import NOTES_FILE
from rayfed_lora.runs.outcome import ending, exported_scores, kept_model
from rayfed_lora.runs.tables import CLIENTS_FILE, ROUNDS_FILE
from rayfed_lora.storage import RunFolder
from rayfed_lora.units import megabytes, percent

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run: its run folder, and the content of summary.json."""

    location: str
    summary: Mapping[str, Any]

    @classmethod
    def open(cls, location: str | Path) -> Result:
        """Return the finished run in a folder, or at a URI.

        Raises:
            RunFolderError: there is no finished run, or its summary is damaged.
        """
        folder = RunFolder(str(location))
        summary = read_summary(folder) if folder.exists(SUMMARY_FILE) else None
        if summary is None:
            begun = folder.exists("recipe.yaml")
            what = "a run that has not finished" if begun else "no run"
            raise RunFolderError(
                f"{location}: expected the folder of a finished run ({SUMMARY_FILE}), found {what}"
            )
        return cls(str(location), summary)

    @property
    def rounds(self) -> pd.DataFrame:
        """rounds.parquet, a row per round; raises RunFolderError if the file is damaged."""
        return self._table(ROUNDS_FILE)

    @property
    def clients(self) -> pd.DataFrame:
        """clients.parquet, a row per client and round; raises as `rounds` does."""
        return self._table(CLIENTS_FILE)

    @property
    def notes(self) -> pd.DataFrame:
        """notes.parquet, columns round and text; empty where the run has none."""
        if not RunFolder(self.location).exists(NOTES_FILE):
            import pandas as pd

            return pd.DataFrame({"round": [], "text": []})
        return self._table(NOTES_FILE)

    @property
    def harness(self) -> dict[str, Any]:
        """harness.json, metrics by task of lm-evaluation-harness; empty where none was computed."""
        from rayfed_lora.launching.harness import kept

        return kept(RunFolder(self.location))

    def _table(self, name: str) -> pd.DataFrame:
        from rayfed_lora.runs.checked import table

        frame: pd.DataFrame = table(RunFolder(self.location), name).to_pandas()
        return frame

    def adapter(self) -> Any:
        """Return the trained `peft.PeftModel` on its base, in evaluation mode.

        Raises:
            BadInputError: the run has no adapter, or its files are damaged.
        """
        from rayfed_lora.models.exported import load_adapter

        labels = self.summary.get("labels", [])
        return self._loaded(lambda folder, task: load_adapter(folder, task, labels), merge=False)

    def model(self) -> Any:
        """Return the trained transformers model, factors merged, in evaluation mode.

        Raises:
            BadInputError: files of the run are damaged.
        """
        from rayfed_lora.models.exported import load_model

        return self._loaded(load_model, merge=True)

    def _loaded(self, load: Any, *, merge: bool) -> Any:
        from rayfed_lora.launching.exporting import export_run
        from rayfed_lora.runs.reading import task_of

        with TemporaryDirectory() as scratch:
            to = Path(scratch, "model")
            for _ in export_run(self.location, to, merge=merge):
                pass
            return load(to, task_of(RunFolder(self.location)))

    def plot(self) -> Any:
        """Return a matplotlib figure of the test accuracy over the bytes sent so far."""
        from rayfed_lora.pages.curves import PLOTS
        from rayfed_lora.pages.plots import drawn
        from rayfed_lora.runs.reading import rounds_so_far

        label = f"{self.summary['name']}, {self.summary['method']}"
        rounds = rounds_so_far(RunFolder(self.location))
        by_bytes = next(plot for plot in PLOTS if plot.file == "accuracy-by-bytes")
        return drawn(by_bytes, rounds.assign(method=label, seed=self.summary["seed"]))

    @property
    def _facts(self) -> dict[str, str]:
        final, sent = self.summary["final"], self.summary["communication"]
        accuracy, reduction = final["eval_accuracy"], sent["reduction_vs_fedavg"]
        said = {"exported": kept_model(self.summary), "stopped by": ending(self.summary)}
        if "kept" in self.summary:
            tested = exported_scores(self.summary)["eval_accuracy"]
            said["its test accuracy"] = "-" if tested is None else f"{tested:.4f}"
        return {
            "run": str(self.summary["name"]),
            "method": str(self.summary["method"]),
            "rounds": str(self.summary["rounds"]),
            "test accuracy": "-" if accuracy is None else f"{accuracy:.4f}",
            "sent": megabytes(sent["total_bytes"]),
            "less than FedAvg": "-" if reduction is None else percent(reduction),
            **{key: text for key, text in said.items() if text is not None},
            "run folder": self.location,
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}: {value}" for name, value in self._facts.items())
        return f"<Result {facts}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self._facts.items()
        )
        return f"<table>{rows}</table>"
