"""An aggregation rule as one object: its facts, its code and its messages.

A built-in rule is a file of `built_in`; a plug-in's is a decorated function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from rayfed_lora.aggregation.means import Float64Array, Kept, Means
from rayfed_lora.aggregation.messages import AdapterRound, Traffic, trained_factors
from rayfed_lora.aggregation.server_step import OptimizerStep
from rayfed_lora.aggregation.step import Aggregate, step_error, stepped_towards
from rayfed_lora.errors import RunError
from rayfed_lora.lora.stacked import named
from rayfed_lora.plugins.tables import RULES
from rayfed_lora.types import AdapterState, FloatArray, Frozen

# From the tensors of the start and those of each client, by name, to the aggregated ones.
OfUpdates = Callable[..., Mapping[str, FloatArray | Float64Array]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How client updates become the next global state, and the size of its messages.

    Attributes:
        name: the value of `aggregation.rule`.
        source: arXiv number.
        summary: one line for the documentation of `aggregation.rule`.
        aggregate: computes the next global state from the one that the clients started from, the
            means of their updates and the server's step.
        kept: what the means must hold for it, beside the dense tensors and the exact updates.
        messages: computes the sizes of an adapter round's messages.
        frozen: returns the factor that clients do not train, from the number of adapter rounds
            before this one.
        method: name of the preset that trains an adapter of one rank under this rule, if any.
        mixed_ranks: whether clients may have different ranks.
        optimizers: whether server optimisers beside sgd make sense: the step is one of A and B.
        personal: whether each client keeps its own B, and sends A only.
        alone: whether each client keeps all that it trains and sends nothing; the global state
            stays the common start.
        restarts: whether each round merges the whole mean into the base and starts LoRA anew.
        mean_only: whether the next state depends on clients by the mean of their sent tensors
            alone, so that noise on that mean protects them.
    """

    name: str
    source: str
    summary: str
    aggregate: Callable[[AdapterState, Means, OptimizerStep], Aggregate]
    kept: frozenset[Kept] = frozenset()
    messages: Callable[[AdapterRound], Traffic] = trained_factors
    frozen: Callable[[int], Frozen | None] = lambda turn: None
    method: str | None = None
    mixed_ranks: bool = False
    optimizers: bool = False
    personal: bool = False
    alone: bool = False
    restarts: bool = False
    mean_only: bool = False

    def means(self) -> Means:
        """Return means that hold no client yet."""
        return Means(self.kept)

    def with_options(self, options: Mapping[str, Any]) -> Rule:
        """Return the rule with options of its function."""
        return replace(self, aggregate=partial(self.aggregate, **options))


def rule(
    name: str | None = None,
    *,
    needs: Literal["updates", "means"] = "updates",
    kept: Iterable[Kept] = (),
    summary: str | None = None,
    source: str = "",
    optimizers: bool | None = None,
    **facts: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """Register an aggregation rule: `@rule()` or `@rule("trimmed-mean")`.

    With needs "updates" the function gets the tensors of the state that the clients started from
    and the `ClientUpdates`, and returns the aggregated tensors, by the same names; the server's
    optimiser steps towards them. The server then holds every client's tensors at once. With
    "means" it gets (state, means, step) and returns an `Aggregate`. Keyword-only parameters are
    its options: keys beside `aggregation.rule`.

    Args:
        name: value of `aggregation.rule`; default: the function's, with hyphens.
        needs: what the function gets.
        kept: what the means must hold, with needs "means".
        summary: one line; default: the first one of the docstring.
        source: arXiv number.
        optimizers: as of `Rule`; default: true with needs "updates".
        facts: other attributes of `Rule`.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """

    def register(function: Callable[..., Any]) -> Any:
        each = needs == "updates"

        def value(own: str) -> Rule:
            first = (function.__doc__ or "").strip().partition("\n")[0]
            return Rule(
                name=own,
                source=source,
                summary=summary or first,
                aggregate=partial(_of_updates, own, function) if each else function,
                kept=frozenset({"updates"} if each else kept),
                optimizers=each if optimizers is None else optimizers,
                **facts,
            )

        return RULES.add(function, name, value=value, bind=Rule.with_options)

    return register


def _of_updates(
    name: str,
    function: OfUpdates,
    start: AdapterState,
    means: Means,
    step: OptimizerStep,
    **options: Any,
) -> Aggregate:
    """Return what a rule makes of each client's tensors, after the server's step."""
    received = named(start)
    found = function(received, means.updates(), **options)
    targets = _checked(name, received, found)
    state = stepped_towards(targets, start, step)
    return Aggregate(state, {}, lambda: step_error(start, state, means, step))


def _checked(
    name: str,
    received: Mapping[str, FloatArray],
    found: Mapping[str, FloatArray | Float64Array],
) -> dict[str, Float64Array]:
    """Return aggregated tensors in float64; raises RunError where they do not fit the state."""
    if not isinstance(found, Mapping) or set(found) != set(received):
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise RunError(
            f"rule {name!r}: expected a mapping with the tensors {sorted(received)}, got {got}"
        )
    checked = {}
    for key, old in received.items():
        tensor = np.asarray(found[key])
        if tensor.shape != old.shape or tensor.dtype.kind != "f":
            raise RunError(
                f"rule {name!r}, tensor {key!r}: expected floats of shape {old.shape}, got"
                f" {tensor.dtype} of {tensor.shape}"
            )
        if not math.isfinite(float(np.sum(tensor, dtype=np.float64))):
            raise RunError(f"rule {name!r}, tensor {key!r}: expected finite values")
        checked[key] = tensor.astype(np.float64)
    return checked
