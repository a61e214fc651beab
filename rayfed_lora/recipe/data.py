"""The data and how they are dealt to clients: sections of the recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayfed_lora.recipe.fields import (
    Auto,
    ClassLabel,
    Count,
    Fraction,
    Positive,
    PositiveFloat,
    Section,
    option,
    section,
)


class Partition(Section):
    """How the training examples are dealt to clients."""

    kind: Literal["iid", "dirichlet", "shards", "quantity", "column"] = option(
        "dirichlet",
        "iid: even and random | dirichlet: label skew | shards: sorted by label, a few pieces each"
        " | quantity: sizes differ, labels do not | column: one client for each value of `column`,"
        " in the order of the values: numbers where all are whole numbers, else texts",
    )
    alpha: PositiveFloat = option(
        0.5, "concentration for dirichlet and quantity; smaller is more uneven"
    )
    clients: Positive = option(100, "number of clients (column: found in the data)", "clients")
    min_examples: Count = option(
        4, "clients with fewer get more from the largest clients (dirichlet, quantity)", "examples"
    )
    shards_per_client: Positive = option(2, "pieces for each client (shards)", "shards")
    column: str | None = option(None, "the column that names the client (column)")


class Data(Section):
    """Where the examples come from and how they are split."""

    source: str = option(
        "digits",
        "a built-in name (digits, trec, vader, fashion-mnist), a .parquet, .csv, .jsonl or .arrow"
        " path or URI, or hf:<id> of a Hugging Face data set",
    )
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = option(
        0.2, "share kept for testing where the source has no test split of its own"
    )
    validation_fraction: Fraction | Auto = option(
        "auto",
        "share of the training examples kept on the server for the annealing feedback;"
        " auto: 0.1 when `annealing.acceptance` needs it (in a comparison: of any method), else 0",
    )
    text_column: str | Auto = option("auto", "column of the text (text tasks)")
    image_column: str | Auto = option("auto", "column of the image (image tasks)")
    label_column: str | Auto = option("auto", "column of the label")
    labels: list[ClassLabel] | None = option(
        None, "keep only the examples with these labels (renumbered in this order); null: all"
    )
    max_examples: Positive | None = option(
        None, "use a random subset of the training examples of this size", "examples"
    )
    max_length: Positive = option(64, "longest text; longer ones are cut", "tokens")
    partition: Partition = section(Partition, "how examples are dealt to clients")
