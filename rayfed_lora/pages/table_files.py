"""Tables as Parquet files, and as CSV for spreadsheets. Source: this project."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

from rayfed_lora.printable import cell
from rayfed_lora.runs import seals
from rayfed_lora.storage import RunFolder


def write_table(folder: RunFolder, stem: str, table: pd.DataFrame) -> None:
    """Write a table as `stem`.parquet, sealed, and as `stem`.csv, without ranks by module."""
    seals.write_table(folder, f"{stem}.parquet", pa.Table.from_pandas(table, preserve_index=False))
    folder.write(f"{stem}.csv", csv_bytes(table.drop(columns="ranks", errors="ignore")))


def csv_bytes(table: pd.DataFrame) -> bytes:
    r"""Return a table as CSV without its index; spreadsheets read no cell as a formula.

    >>> csv_bytes(pd.DataFrame({"name": ["=1+1", "a"], "loss": [-0.5, 1.0]}))
    b"name,loss\n'=1+1,-0.5\na,1.0\n"
    """
    texts = [i for i, kind in enumerate(table.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    shown = table.copy()
    for i in texts:
        shown.isetitem(i, list(map(cell, table.iloc[:, i])))
    return shown.rename(columns=cell).to_csv(index=False).encode()
