"""Tables as CSV. Source: this project."""

from __future__ import annotations

import pandas as pd

from rayfed_lora.printable import cell


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
