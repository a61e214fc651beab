"""Checks of a recipe's values against each other, once each is valid on its own.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Iterator

from rayfed_lora.locations import holds_secret, repeated_option
from rayfed_lora.recipe.conflict import Conflict
from rayfed_lora.recipe.devices import Spread
from rayfed_lora.recipe.runtime import Runtime
from rayfed_lora.recipe.schedule_checks import acceptance_conflicts, rule_conflicts, stage_conflicts
from rayfed_lora.recipe.settings import Settings


def conflicts(recipe: Settings) -> list[Conflict]:
    """Return every conflict of a recipe whose values are each valid."""
    return [
        *_location_conflicts(recipe),
        *_data_and_model_conflicts(recipe),
        *stage_conflicts(recipe.annealing),
        *acceptance_conflicts(recipe),
        *_client_conflicts(recipe),
        *rule_conflicts(recipe),
        *_device_conflicts(recipe),
        *_evaluation_conflicts(recipe),
        *_actor_conflicts(recipe.runtime),
    ]


def _location_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """A recipe is kept with its run, and shown in reports: it may not hold credentials."""
    named = {
        "data.source": recipe.data.source,
        "model.source": recipe.model.source,
        "model.tokenizer": recipe.model.tokenizer,
        "clients.availability.trace": recipe.clients.availability.trace,
        "storage.path": recipe.storage.path,
    }
    for key, location in named.items():
        if location is not None and location.lower().startswith("fsspec+"):
            # fsspec has many filesystems, each with its own way to find credentials.
            yield Conflict((key,), "expected a path, or a URI of s3, gs, abfs, hdfs or file")
        twice = None if location is None else repeated_option(location)
        if twice is not None:
            yield Conflict((key,), f"expected each option of a URI once, got {twice!r} again")
        if location is not None and holds_secret(location):
            yield Conflict(
                (key,),
                "expected a URI without credentials; they come from the environment, ~/.aws or the"
                " machine's role",
            )


def _data_and_model_conflicts(recipe: Settings) -> Iterator[Conflict]:
    partition, model = recipe.data.partition, recipe.model
    if partition.kind == "column" and partition.column is None:
        yield Conflict(
            ("data.partition.column", "data.partition.kind"),
            "partition kind 'column' needs the name of a data column, got null",
        )
    if model.source == "config" and not isinstance(model.config.get("architecture"), str):
        yield Conflict(
            ("model.config.architecture", "model.config", "model.source"),
            "model source 'config' needs a transformers model type such as vit or bert",
        )
    if model.task == "causal-lm" and recipe.adapter.train_head:
        yield Conflict(
            ("adapter.train_head", "model.task", "method"),
            "expected false with model.task 'causal-lm', whose output layer is its vocabulary and"
            " stays frozen, got true",
        )


def _client_conflicts(recipe: Settings) -> Iterator[Conflict]:
    clients, partition = recipe.clients, recipe.data.partition
    if clients.local_steps is not None and clients.local_epochs is not None:
        yield Conflict(
            ("clients.local_epochs", "clients.local_steps"),
            "expected local_steps or local_epochs, got both",
        )
    known = partition.kind != "column" and isinstance(clients.per_round, int)
    if known and clients.per_round > partition.clients:
        yield Conflict(
            ("clients.per_round", "data.partition.clients"),
            f"expected at most data.partition.clients ({partition.clients}),"
            f" got {clients.per_round}",
        )


def _evaluation_conflicts(recipe: Settings) -> Iterator[Conflict]:
    settings = recipe.evaluation
    if settings.clients_every is not None and settings.client_fraction == 0:
        yield Conflict(
            ("evaluation.client_fraction", "evaluation.clients_every"),
            "evaluation.clients_every needs examples to test clients on: expected a share above 0,"
            " got 0",
        )


def _device_conflicts(recipe: Settings) -> Iterator[Conflict]:
    clients, network = recipe.clients, recipe.network
    spreads = {
        "clients.speed": clients.speed,
        "network.up_mbps": network.up_mbps,
        "network.down_mbps": network.down_mbps,
    }
    for path, spread in spreads.items():
        if spread is not None:
            yield from _spread_conflicts(path, spread)
    time_passes = network.latency_s > 0 or any(spread is not None for spread in spreads.values())
    if clients.deadline_s is not None and not time_passes:
        yield Conflict(
            ("clients.deadline_s", "clients.speed", "network"),
            "no client can be late without simulated time: expected clients.speed or network too",
        )
    if clients.availability.period_s is not None and clients.availability.trace is None:
        yield Conflict(
            ("clients.availability.period_s", "clients.availability.trace"),
            "expected a trace to repeat, got none",
        )


def _spread_conflicts(path: str, spread: Spread) -> Iterator[Conflict]:
    given = [key for key in ("median", "low", "high", "column") if getattr(spread, key) is not None]
    expected = {"lognormal": ["median"], "uniform": ["low", "high"]}[spread.distribution]
    if given not in (expected, ["column"]):
        yield Conflict(
            (path,),
            f"distribution '{spread.distribution}' expects {' and '.join(expected)}, or a column"
            f" instead, got {', '.join(given) or 'none of them'}",
        )
    elif spread.low is not None and spread.high is not None and spread.low > spread.high:
        yield Conflict(
            (f"{path}.low", f"{path}.high"),
            f"expected at most high ({spread.high:g}), got {spread.low:g}",
        )
    elif spread.sigma > 0 and spread.median is None:
        yield Conflict(
            (f"{path}.sigma", path),
            f"expected 0 without a lognormal distribution's median, got {spread.sigma:g}",
        )


def _actor_conflicts(runtime: Runtime) -> Iterator[Conflict]:
    share = runtime.gpus_per_actor
    if runtime.scale_up_s is not None and "auto" in (runtime.client_actors, runtime.device):
        yield Conflict(
            ("runtime.scale_up_s", "runtime.client_actors", "runtime.device"),
            "needs to know which nodes to wait for: expected a number of client_actors, and device"
            f" cuda or cpu, got {runtime.client_actors} and {runtime.device}",
        )
    if share == "auto":
        return
    if share > 1 and share != int(share):
        yield Conflict(
            ("runtime.gpus_per_actor",), f"above 1 expected a whole number, got {share:g}"
        )
    if abs(share * 1e4 - round(share * 1e4)) > 1e-6:
        yield Conflict(("runtime.gpus_per_actor",), f"expected steps of 0.0001, got {share:g}")
    if runtime.device == "cuda" and share == 0:
        yield Conflict(
            ("runtime.gpus_per_actor", "runtime.device"), "device 'cuda' needs a share above 0"
        )
