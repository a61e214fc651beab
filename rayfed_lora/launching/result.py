"""The result of a run. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayfed_lora.storage import RunFolder

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        location: its run folder.
        summary: content of summary.json.
    """

    location: str
    summary: Mapping[str, Any]

    @property
    def rounds(self) -> pd.DataFrame:
        """rounds.parquet, a row per round; raises RunFolderError if the file is damaged."""
        return self._table("rounds.parquet")

    @property
    def clients(self) -> pd.DataFrame:
        """clients.parquet, a row per client and round; raises as `rounds` does."""
        return self._table("clients.parquet")

    def _table(self, name: str) -> pd.DataFrame:
        from rayfed_lora.runs.checked import table

        frame: pd.DataFrame = table(RunFolder(self.location), name).to_pandas()
        return frame
