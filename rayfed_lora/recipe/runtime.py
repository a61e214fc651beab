"""How a run executes: tests, actors, run folder, trackers; sections of the recipe."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayfed_lora.plugins.tables import METRICS
from rayfed_lora.recipe.fields import (
    Auto,
    Count,
    Fraction,
    NameIn,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    also_plain,
    option,
    short_for,
)

Label = Annotated[str, Field(min_length=1)]


class EarlyStopping(Section):
    """The end of a run that no longer improves on the validation split."""

    metric: Annotated[str, NameIn(METRICS)] = option("loss", "metric on the validation split")
    patience: Positive = option(
        5, "the run ends after so many tests without an improvement", "tests"
    )
    min_delta: NonNegative = option(0.0, "a smaller change is no improvement")


class Generate(Section):
    """Greedy answers of a language model to prompts of the test split."""

    max_new_tokens: Positive = option(64, "longest answer", "tokens")
    examples: Positive | Literal["all"] = option(
        100, "number of test rows whose prompts are asked, drawn from the seed, or all", "examples"
    )
    every: Positive | None = option(
        None, "after every n-th round, and after the last one; null: after the last only", "rounds"
    )
    base: bool = option(True, "ask the model before training too, to compare with")


class Harness(Section):
    """Tasks of lm-evaluation-harness, on which the exported language model is tested."""

    tasks: list[Label] = option([], "names of tasks or groups (pip install 'rayfed-lora[harness]')")
    include: Label | None = option(None, "folder with tasks of your own (YAML)")
    limit: Positive | None = option(None, "most examples of a task; null: all", "examples")
    few_shot: Count | None = option(
        None, "solved examples in the prompt; null: as each task says", "examples"
    )
    chat_template: bool = option(False, "ask prompts as a user's turns, as a chat model expects")
    batch_size: Positive = option(8, "examples in a forward pass", "examples")


def _best_by(given: Any) -> Any:
    return {True: "loss", False: None}[given] if isinstance(given, bool) else given


class Evaluation(Section):
    """When and how the global model is tested."""

    metrics: list[Annotated[str, NameIn(METRICS)]] = option(
        [], "own metrics that are computed beside the built-in ones"
    )
    early_stopping: EarlyStopping | None = option(
        None,
        "end the run when it no longer improves on the validation split, which is tested together"
        " with the test split; null: never",
    )
    keep_best: Annotated[
        Annotated[str, NameIn(METRICS)] | None,
        BeforeValidator(_best_by, json_schema_input_type=str | bool | None),
    ] = option(
        None,
        "metric on the validation split by which the best model is kept and exported; true: loss |"
        " null or false: the last model is exported",
    )
    every: Positive = option(1, "test after every n-th round, and after the last one", "rounds")
    batch_size: Positive = option(256, "examples in a forward pass", "examples")
    generate: Generate | None = option(
        None,
        "exact match and ROUGE-L of a language model's answers to the test split's prompts; null:"
        " none are generated",
    )
    harness: Annotated[Harness, short_for({list: "tasks"})] = Field(
        default_factory=Harness,
        description="tests of the exported language model by lm-evaluation-harness, in the process"
        " that started the run; a list: its tasks",
        json_schema_extra=lambda schema: also_plain(schema, "array"),
    )
    client_fraction: Fraction = option(
        0.0, "share of each client's examples that is held out to test that client; 0: none"
    )
    clients: Positive | Literal["all"] = option(
        "all", "clients tested on their own held-out examples: all, or a number drawn for each test"
    )
    clients_every: Positive | None = option(
        None,
        "test clients after every n-th round, and after the last one; null: after the last only",
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics beside the built-in ones that rounds have a column `eval_<name>` of."""
        generated = () if self.generate is None else ("exact_match", "rouge_l")
        return (*self.metrics, *generated)

    @property
    def watched(self) -> tuple[str, ...]:
        """The metrics that early stopping and the choice of the best model look at."""
        stopping = () if self.early_stopping is None else (self.early_stopping.metric,)
        return (*stopping, *(() if self.keep_best is None else (self.keep_best,)))


class Runtime(Section):
    """Where and how the work runs.

    On one kind of device these keys change no result, except for `cohort_size`,
    `threads_per_actor` and `precision`, which change the rounding of float32 (and `cohort_size`
    the dropout masks of texts of different lengths).
    """

    executor: Literal["ray", "local"] = option("ray", "ray, or local: in this process, without Ray")
    client_actors: Positive | Auto = option(
        "auto",
        "auto: as many as fit the cluster; executor local: threads on a CPU, auto: one",
        "actors",
    )
    gpus_per_actor: NonNegative | Auto = option(
        "auto",
        "auto: 1 where the cluster has GPUs, else 0; fractions share a GPU; at most 1",
        "GPUs",
    )
    cpus_per_actor: PositiveFloat = option(
        1.0,
        "CPU cores reserved for an actor; on a CPU it trains one block at once for every"
        " `threads_per_actor` cores",
        "cores",
    )
    cohort_size: Positive | Auto = option(
        "auto", "clients trained together; auto: by the model's work and memory", "clients"
    )
    threads_per_actor: Positive = option(
        1, "torch threads for a block; with 1 results are bit-for-bit reproducible", "threads"
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32 | bf16: autocast")
    checkpoint_activations: bool | Auto = option(
        "auto",
        "compute activations again in the backward pass instead of keeping them: a third more time"
        " for a fraction of the memory, to the same values; auto: in language models, where those"
        " of a block would take over 1 GB on a CPU, 8 GB on a GPU",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto: a GPU where the cluster has one, else the CPU | cuda: an error without a GPU"
    )
    start_timeout_s: PositiveFloat = option(
        120.0, "longest wait for resources in use by others", "s"
    )
    scale_up_s: PositiveFloat | None = option(
        None,
        "longest wait for an autoscaling cluster to start nodes for `client_actors` actors; null:"
        " use only nodes that are already up",
        "s",
    )
    block_timeout_s: PositiveFloat | None = option(
        None,
        "an actor whose block, or share of a test, takes longer is ended and its work is rerun"
        " (executor ray); null: no limit",
        "s",
    )

    @property
    def trainers_per_actor(self) -> int:
        """Number of blocks that an actor on a CPU trains at once, each in its own thread.

        >>> Runtime(cpus_per_actor=2.0).trainers_per_actor
        2
        """
        return max(1, math.floor(self.cpus_per_actor / self.threads_per_actor))


class Storage(Section):
    """The run folder, and how often the run is saved."""

    path: str | None = option(
        None, "run folder, or a URI that pyarrow.fs opens; null: runs/<name>-<time>"
    )
    checkpoint_every: Positive = option(1, "save after every n-th round", "rounds")
    keep: Positive = option(2, "number of newest checkpoints to keep", "checkpoints")
    adapters_every: Positive | None = option(
        None,
        "keep the PEFT adapter after every n-th round, in adapters/round-...; null: the last alone",
        "rounds",
    )


class Tracking(Section):
    """Trackers that receive the rows of rounds.parquet during the run.

    Addresses and keys of servers are no part of a recipe: W&B and MLflow read them from their own
    environment variables.
    """

    tensorboard: bool = option(False, "write TensorBoard event files into the run folder")
    wandb: Label | None = option(None, "Weights & Biases project; null: none")
    mlflow: Label | None = option(None, "MLflow experiment; null: none")
