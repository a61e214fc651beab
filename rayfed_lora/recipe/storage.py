"""The run folder and trackers: sections of the recipe. Source: this project."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayfed_lora.recipe.fields import Positive, Section, option

Label = Annotated[str, Field(min_length=1)]


class Storage(Section):
    """The run folder, and how often the run is saved."""

    path: str | None = option(
        None, "run folder, or a URI that pyarrow.fs opens; null: runs/<name>-<time>"
    )
    checkpoint_every: Positive = option(1, "save after every n-th round", "rounds")
    keep: Positive = option(2, "number of newest checkpoints to keep", "checkpoints")


class Tracking(Section):
    """Trackers that receive the rows of rounds.parquet during the run.

    Addresses and keys of servers are no part of a recipe: W&B and MLflow read them from their own
    environment variables.
    """

    tensorboard: bool = option(False, "write TensorBoard event files into the run folder")
    wandb: Label | None = option(None, "Weights & Biases project; null: none")
    mlflow: Label | None = option(None, "MLflow experiment; null: none")
