"""The recipe: every option with its meaning, unit, range and default.

The keys are a contract (they stand in every recipe that users keep); `recipe_loading` reads
them from YAML. Nothing here imports torch, transformers or Ray.

Source: this project (the formulas behind the options: `annealing`, `lora`, `aggregation`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from rayfed_lora.recipe.annealing import Annealing
from rayfed_lora.recipe.clients import Clients
from rayfed_lora.recipe.devices import (
    Network,
)
from rayfed_lora.recipe.fields import (
    ENDPOINTS,
    Auto,
    ClassLabel,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    option,
    section,
)
from rayfed_lora.recipe.filling import filled, values_of
from rayfed_lora.recipe.plain_values import strange
from rayfed_lora.recipe.presets import usual_server_rate

Method = Literal[
    "sa-fedlora",
    "fedavg",
    "fedprox",
    "fedlora",
    "ffa-lora",
    "flora",
    "flexlora",
    "hetlora",
    "fedex-lora",
    "rolora",
    "fedsa-lora",
    "lora-fair",
    "spd-cfl",
    "head-only",
    "bitfit",
]
Scaling = Literal["constant", "alpha_over_rank", "rslora"]
Rule = Literal[
    "factor-average",
    "product-svd",
    "stacking",
    "residual",
    "freeze-a",
    "alternate",
    "zero-pad",
    "share-a",
    "correct",
]


# 4 * 1.3 is a little more than 5.2 in floating point; 10 * 1.1 is to be 11.
_ROUNDING = 1e-9


class Partition(Section):
    """How the training examples are dealt to clients."""

    kind: Literal["iid", "dirichlet", "shards", "quantity", "column"] = option(
        "dirichlet",
        "iid: even and random | dirichlet: label skew | shards: sorted by label, a few pieces each"
        " | quantity: sizes differ, labels do not | column: one client a value of `column`, in the"
        " order of the values: as numbers where all are whole numbers, else as texts",
    )
    alpha: PositiveFloat = option(
        0.5, "concentration for dirichlet and quantity; smaller is more uneven"
    )
    clients: Positive = option(100, "number of clients (column: found in the data)", "clients")
    min_examples: Count = option(
        4,
        "a client with fewer is topped up from the largest ones (dirichlet, quantity)",
        "examples",
    )
    shards_per_client: Positive = option(2, "pieces a client (shards)", "shards")
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
    max_length: Positive = option(64, "longest text, the rest is cut", "tokens")
    partition: Partition = section(Partition, "how examples are dealt to clients")


class Model(Section):
    """The base model."""

    task: Literal["image-classification", "text-classification", "causal-lm"] = option(
        "image-classification", "what the model is trained for"
    )
    source: str = option(
        "config",
        "config (random initial weights), package:<name>[/<folder>] (a model inside an installed"
        " Python package), a local folder, or a hub id",
    )
    tokenizer: str | None = option(
        None, "where the tokenizer comes from, as `source`; null: from the model's own source"
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="for source config: `architecture` (vit, bert, ...) and transformers' own"
        " names; for other sources: values that override the model's configuration",
    )

    @field_validator("config")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        found = strange(value)
        if found is not None:
            raise ValueError(f"expected texts, finite numbers, true, false and null, got {found}")
        # Names are texts: YAML's {0: cat} comes back from the resolved recipe as {"0": cat}.
        named: dict[str, Any] = json.loads(json.dumps(value))
        return named


class Adapter(Section):
    """Where LoRA factors are put, and how they are scaled."""

    target_modules: str | list[str] = option(
        "auto",
        "auto (query and value projections), all-linear (all but the head), a list of name"
        " endings, or one regular expression over full names",
    )
    alpha: PositiveFloat = option(16.0, "LoRA alpha: the scale is alpha / heating.rank")
    dropout: Fraction = option(0.0, "dropout before the factors")
    scaling: Scaling = option(
        "constant",
        "constant: alpha / heating.rank for the whole run | alpha_over_rank: alpha / rank"
        " | rslora: alpha / sqrt(rank); no mode changes the update when the rank changes",
    )
    train_head: bool = option(
        True, "train, send and average the task head too; a language model has none: default false"
    )
    train_biases: bool = option(False, "train, send and average every bias too (BitFit)")
    head_modules: list[str] | Auto = option(
        "auto", "module names that make up the head; auto: what the model puts after its encoder"
    )


class ServerOptimizer(Section):
    """The step the server takes along the averaged update."""

    name: Literal["sgd", "momentum", "adam", "yogi"] = option(
        "sgd", "sgd with lr 1 is plain averaging | momentum (FedAvgM) | adam, yogi (FedOpt)"
    )
    lr: PositiveFloat = option(
        1.0, "server learning rate; where it is not given: 1 for sgd and momentum, 0.01 else"
    )
    momentum: Fraction = option(0.9, "share of the earlier updates that is kept (momentum)")
    beta1: Fraction = option(0.9, "decay of the mean update (adam, yogi)")
    beta2: Fraction = option(0.99, "decay of the mean squared update (adam, yogi)")
    tau: PositiveFloat = option(1e-3, "added to the root of the mean square (adam, yogi)")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_kind(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("lr") is not None:
            return given
        return {**given, "lr": usual_server_rate(given.get("name"))}


class Aggregation(Section):
    """How client updates become the next global state."""

    rule: Rule = option(
        "factor-average",
        "factor-average: means of A and of B apart (FedIT) | product-svd: the exact mean of the"
        " products, cut back to the rank (FlexLoRA) | stacking: the exact mean goes into the base,"
        " LoRA starts anew each round (FLoRA) | residual: factor-average, what it lacks goes into"
        " the base (FedEx-LoRA) | freeze-a: A stays as drawn (FFA-LoRA) | alternate: B and A in"
        " turns (RoLoRA) | zero-pad: padded to the largest rank, weighted by update size (HetLoRA)"
        " | share-a: clients keep their own B (FedSA-LoRA) | correct: factor-average with B moved"
        " towards the exact mean (LoRA-FAIR)",
    )
    server_optimizer: ServerOptimizer = section(ServerOptimizer, "the server's step")


class Evaluation(Section):
    """When and how the global model is tested."""

    every: Positive = option(1, "test after every so many rounds, and after the last", "rounds")
    batch_size: Positive = option(256, "examples a forward pass", "examples")
    client_fraction: Fraction = option(
        0.0, "share of each client's examples that is kept to test on that client; 0: none"
    )
    clients: Positive | Literal["all"] = option(
        "all", "clients tested on examples of their own: all, or so many drawn anew each time"
    )
    clients_every: Positive | None = option(
        None, "test on clients after every so many rounds, and after the last; null: then only"
    )


class Runtime(Section):
    """Where the work runs.

    On the same kind of device nothing here changes a result, but for the rounding of float32 that
    comes with another `cohort_size`, `threads_per_actor` or `precision` (and with `cohort_size`
    for the dropout masks of texts of different lengths).
    """

    executor: Literal["ray", "local"] = option("ray", "ray, or local: in this process, without Ray")
    client_actors: Positive | Auto = option(
        "auto",
        "auto: as many as the cluster holds; executor local: threads on a CPU, auto: one",
        "actors",
    )
    gpus_per_actor: NonNegative | Auto = option(
        "auto", "auto: 1 where the cluster has GPUs, else 0; fractions share a GPU", "GPUs"
    )
    cpus_per_actor: PositiveFloat = option(
        1.0,
        "CPU cores reserved for an actor; on a CPU it trains a block in each `threads_per_actor` of"
        " them",
        "cores",
    )
    cohort_size: Positive | Auto = option(
        "auto", "clients trained together; auto: by the model's work and memory", "clients"
    )
    threads_per_actor: Positive = option(
        1, "torch threads for a block; 1 makes results bit-identical", "threads"
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32 | bf16: autocast")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto: a GPU where the cluster has one, else the CPU | cuda: refuse without a GPU"
    )
    start_timeout_s: PositiveFloat = option(
        120.0, "how long to wait for resources that others hold", "s"
    )
    scale_up_s: PositiveFloat | None = option(
        None,
        "how long an autoscaling cluster may take to bring nodes for `client_actors` actors; null:"
        " only nodes that are there count",
        "s",
    )
    block_timeout_s: PositiveFloat | None = option(
        None,
        "an actor whose block, or share of a test, takes longer is ended and the work run again"
        " (executor ray); null: no limit",
        "s",
    )

    @property
    def trainers_per_actor(self) -> int:
        """How many blocks an actor on a CPU trains at once, each in a thread of its own.

        >>> Runtime(cpus_per_actor=2.0).trainers_per_actor
        2
        """
        return max(1, math.floor(self.cpus_per_actor / self.threads_per_actor))


class Storage(Section):
    """Where the run folder is, and how often the run is saved."""

    path: str | None = option(
        None, "run folder, or a URI that pyarrow.fs opens; null: runs/<name>-<time>"
    )
    checkpoint_every: Positive = option(1, "save after every so many rounds", "rounds")
    keep: Positive = option(2, "how many of the newest checkpoints to keep", "checkpoints")


Label = Annotated[str, Field(min_length=1)]


class Tracking(Section):
    """Where else the rows of rounds.parquet go while the run goes on.

    Addresses and keys of servers are not a recipe's: W&B and MLflow read them from their own
    environment variables.
    """

    tensorboard: bool = option(False, "write TensorBoard event files into the run folder")
    wandb: Label | None = option(None, "Weights & Biases project; null: none")
    mlflow: Label | None = option(None, "MLflow experiment; null: none")


class Recipe(Section):
    """A federated fine-tuning run, complete."""

    # Made by Python's own call it gets the preset of its method and is checked, as from a file.
    # Copies that `model_copy` changes are not: what takes a recipe passes it through `load_recipe`.

    name: str = Field(
        "run", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run"
    )
    seed: Count = option(0, "seed of every random draw")
    method: Method = option("sa-fedlora", "preset that fills in keys; a key that is written wins")
    data: Data = section(Data, "examples and clients")
    model: Model = Field(description="base model")
    adapter: Adapter = section(Adapter, "LoRA")
    annealing: Annealing = section(Annealing, "schedule of the parameter budget")
    aggregation: Aggregation = section(Aggregation, "server")
    clients: Clients = section(Clients, "cohort and local training")
    network: Network = section(Network, "simulated network")
    evaluation: Evaluation = section(Evaluation, "tests of the global model")
    runtime: Runtime = section(Runtime, "executor")
    storage: Storage = section(Storage, "run folder")
    tracking: Tracking = section(Tracking, "TensorBoard, W&B, MLflow")
    # What it was made with: copies that `model_copy` changes keep this.
    _made: Mapping[str, Any] = PrivateAttr(default_factory=dict)
    _asked: frozenset[str] | None = PrivateAttr(None)
    _overruled: tuple[str, ...] = PrivateAttr(())

    def __eq__(self, other: object) -> bool:
        """Whether all values are equal, wherever they come from."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    # Values may be mappings.
    __hash__ = None  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any, info: ValidationInfo) -> Any:
        named = (info.context or {}).get(ENDPOINTS, ())
        return filled(given, named) if isinstance(given, Mapping) else given

    @property
    def preset(self) -> str:
        """The method whose preset has filled in keys; a changed copy may name another `method`."""
        return str(self.made["method"])

    @property
    def made(self) -> dict[str, Any]:
        """The nested values that it was made with, also where it is a changed copy."""
        return values_of(self._made or self)

    @property
    def asked(self) -> frozenset[str] | None:
        """Keys that the user asked for, where others are of a resolved recipe or another method's.

        None: all that are written. Empty in the runs of a comparison, whose keys are for several
        methods.
        """
        return self._asked

    @property
    def overruled(self) -> tuple[str, ...]:
        """What the user has asked for and does not get, one line each."""
        return self._overruled

    def told(self, asked: frozenset[str] | None, overruled: tuple[str, ...]) -> Recipe:
        """Return an equal recipe that knows this of its making."""
        copy = self.model_copy()
        copy._asked, copy._overruled = asked, overruled
        return copy

    @model_validator(mode="after")
    def _values_go_together(self) -> Recipe:
        from rayfed_lora.recipe.checks import ConflictError, conflicts

        self._made = dict(vars(self))
        found = conflicts(self)
        if found:
            raise ConflictError(found)
        return self

    @property
    def validation_fraction(self) -> float:
        """Share of the training examples that the server keeps for feedback."""
        fraction = self.data.validation_fraction
        if fraction != "auto":
            return fraction
        return 0.0 if self.annealing.feedback == "always" else 0.1

    def cohort_size(self, clients: int) -> int:
        """Return how many of `clients` clients take part in a round, at least 1."""
        share = self.clients.per_round
        return share if isinstance(share, int) else max(1, math.floor(share * clients + 0.5))

    def drawn(self, clients: int) -> int:
        """Return how many of `clients` clients are drawn for a round, late ones included."""
        wanted = self.cohort_size(clients) * self.clients.over_select
        return min(clients, math.ceil(wanted - _ROUNDING))

    @property
    def simulates_time(self) -> bool:
        """Whether clients come, go or take time by the simulated clock."""
        own, network = self.clients, self.network
        spreads = (own.speed, network.up_mbps, network.down_mbps)
        comes_and_goes = own.availability.dropout > 0 or own.availability.trace is not None
        takes_time = network.latency_s > 0 or any(spread is not None for spread in spreads)
        return comes_and_goes or takes_time or own.over_select > 1 or own.deadline_s is not None

    @property
    def device_columns(self) -> tuple[str, ...]:
        """Columns of the data that say what clients' devices are like."""
        spreads = (self.clients.speed, self.network.up_mbps, self.network.down_mbps)
        named = [spread.column for spread in spreads if spread is not None]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def most_failed(self, cohort: int) -> int:
        """Return how many of a cohort may raise an error before the run ends."""
        most = self.clients.max_failed
        return most if isinstance(most, int) else math.floor(most * cohort)
