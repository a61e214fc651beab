"""The run folder and trackers: sections of the recipe. Source: this project."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayfed_lora.recipe.fields import Positive, Section, option

Label = Annotated[str, Field(min_length=1)]


class Storage(Section):
    """Where the run folder is, and how often the run is saved."""

    path: str | None = option(
        None, "run folder, or a URI that pyarrow.fs opens; null: runs/<name>-<time>"
    )
    checkpoint_every: Positive = option(1, "save after every so many rounds", "rounds")
    keep: Positive = option(2, "how many of the newest checkpoints to keep", "checkpoints")


class Tracking(Section):
    """Where else the rows of rounds.parquet go while the run goes on.

    Addresses and keys of servers are not a recipe's: W&B and MLflow read them from their own
    environment variables.
    """

    tensorboard: bool = option(False, "write TensorBoard event files into the run folder")
    wandb: Label | None = option(None, "Weights & Biases project; null: none")
    mlflow: Label | None = option(None, "MLflow experiment; null: none")
