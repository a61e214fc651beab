"""The clients of a `Train` on their way to the means of their updates. Source: this project."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import BlockMemoryError, ClientError, RunError
from rayfed_lora.lora.stacked import A, B
from rayfed_lora.objectives.objective import trained_tensors
from rayfed_lora.objectives.remembered import LOST
from rayfed_lora.plugins.tables import WEIGHTS
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.messages import Block, TestClients, Train, Trained
from rayfed_lora.types import AdapterState, ClientReport, Factors, FloatArray
from rayfed_lora.wire.upload import Lost, is_sent, uploaded


@dataclass(frozen=True)
class BlockUpdate:
    """What the clients of a block send back.

    Attributes:
        reports: one a client, in the order of the block.
        states: trained states of the usable ones, in that order; `StackedStates` where they were
            trained together.
    """

    reports: tuple[ClientReport, ...]
    states: Sequence[AdapterState]


# Trains a block from a state of each client.
TrainBlock = Callable[[Block, Sequence[AdapterState]], BlockUpdate]


def weight(name: str | None = None) -> Callable[[Callable[..., float]], Any]:
    """Register how much a client counts: a function of its `ClientReport`, a number above 0.

    Keyword-only parameters are its options.

    Args:
        name: value of `clients.weight`; default: the function's, with hyphens.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """
    return lambda function: WEIGHTS.add(function, name)


@weight("examples")
def by_examples(report: ClientReport) -> float:
    """Return the client's number of training examples: FedAvg, arXiv:1602.05629."""
    return float(report.examples)


@weight("uniform")
def alike(report: ClientReport) -> float:
    """Return 1 for each client."""
    del report
    return 1.0


def chosen_weight(recipe: Recipe) -> Callable[[ClientReport], float]:
    """Return the weight of a recipe, whose result is checked.

    Raises, when called, a RunError that names the weight, the client and the round.
    """
    settings = recipe.clients.weight
    weigh = WEIGHTS.with_options(settings.name, settings.options)

    def checked(report: ClientReport) -> float:
        found = weigh(report)
        if not (isinstance(found, (int, float)) and 0.0 < found < math.inf):
            raise RunError(
                f"weight {settings.name!r} of client {report.client}: expected a finite number"
                f" above 0, got {found!r}"
            )
        return float(found)

    return checked


def trained(
    task: Train,
    train_block: TrainBlock,
    weigh: Callable[[ClientReport], float] = lambda report: float(report.examples),
) -> Trained:
    """Train block by block and reduce the updates; of each block only the means stay.

    Args:
        task: the clients.
        train_block: trains a block; raises ClientError, BlockMemoryError.
        weigh: returns how much a client counts, > 0.

    Raises:
        ClientError: a client raised, or does not fit into memory alone, and the plan is not
            tolerant.
        BlockMemoryError: a block of several clients does not fit.
    """
    rule = RULES[task.rule]
    means = rule.means()
    starts = Starts(task, own_b=rule.personal)
    sent = _Sent(task, starts, own_b=rule.personal)
    reports: list[ClientReport] = []
    for block in task.blocks:
        left = block
        while left:
            try:
                begun = [starts.of(client) for client in left]
                update = train_block(left, begun)
                told = _reports(task, begun, update)
            except ClientError as error:
                if not task.plan.tolerant:
                    raise
                # Without the traceback, which would hold the tensors of the failed step.
                failure = error.with_traceback(None)
                failure.__cause__ = failure.__context__ = None
            except BlockMemoryError as error:
                if any(len(each) > 1 for each in task.blocks):
                    raise
                failure = ClientError(left[0], task.plan.round, str(error))
            else:
                usable = [report for report in update.reports if report.usable]
                ids = [report.client for report in usable]
                states = sent.states(ids, update.states)
                means.add_all(sent.weights(usable, weigh), states, ids)
                reports += sent.with_lost(told)
                break
            if not task.plan.tolerant:
                raise failure
            reports.append(_raised(failure))
            left = tuple(client for client in left if client != failure.client)
    means.pack()
    order = {client: i for i, client in enumerate(task.clients)}
    reports.sort(key=lambda report: order[report.client])
    if task.note is not None and reports:
        notes = [note for note in (task.note, reports[0].note) if note is not None]
        reports[0] = replace(reports[0], note="; ".join(notes))
    return Trained(tuple(reports), means)


class _Sent:
    """What the server sees of trained states, and how much each of them counts."""

    def __init__(self, task: Train, starts: Starts, *, own_b: bool) -> None:
        self._task, self._starts, self._own_b = task, starts, own_b
        self._lost = Lost({k: task.remembered.lost_of(k) for k in task.clients})
        seen = task.model.sent
        self._exact = starts if seen is None else Starts(task, own_b=own_b, exact=True)

    def weights(
        self, reports: Sequence[ClientReport], weigh: Callable[[ClientReport], float]
    ) -> list[float]:
        upload = self._task.upload
        same = upload is not None and upload.uniform
        return [1.0 if same else weigh(report) for report in reports]

    def states(
        self, clients: Sequence[int], states: Sequence[AdapterState]
    ) -> Sequence[AdapterState]:
        task = self._task
        if task.upload is None or not clients:
            return states
        frozen, own_b = task.plan.frozen, self._own_b
        return uploaded(
            task.upload,
            task.plan.round,
            clients,
            states,
            [self._starts.of(client) for client in clients],
            [self._exact.of(client) for client in clients],
            lambda name: is_sent(name, frozen, own_b),
            lost=self._lost,
        )

    def with_lost(self, reports: Sequence[ClientReport]) -> list[ClientReport]:
        """Return reports with what the codec has lost of each client's update so far."""
        return [self._with_lost(report) for report in reports]

    def _with_lost(self, report: ClientReport) -> ClientReport:
        lost = self._lost.after.get(report.client)
        if lost is None:
            return report
        kept = {LOST + name: array for name, array in lost.items()}
        return replace(report, memory={**(report.memory or {}), **kept})


def _raised(error: ClientError) -> ClientReport:
    return ClientReport(error.client, 0, float("nan"), 0.0, error.reason, error.trace)


def _reports(
    task: Train, starts: Sequence[AdapterState], update: BlockUpdate
) -> list[ClientReport]:
    """Return the reports of a block with what each client keeps and what its objective sends.

    Raises:
        ClientError: a hook of the objective raised, or returned something else than declared.
    """
    rule, remembered = RULES[task.rule], task.remembered
    if not (rule.personal or rule.alone) and remembered.objective.hook("after") is None:
        return list(update.reports)
    ends = iter(update.states)
    reports = []
    for report, start in zip(update.reports, starts, strict=True):
        new = report
        if report.usable:
            end = next(ends)
            if rule.personal:
                new = replace(new, personal={n: f.b for n, f in end.factors.items()} or None)
            elif rule.alone:
                new = replace(new, personal=trained_tensors(end, task.plan.frozen) or None)
            with attributed(report.client, task.plan.round):
                new = remembered.reported(new, start, end, task.plan)
        reports.append(new)
    return reports


class Starts:
    """The states that clients start a round from, or are tested with.

    A limited client gets the first rows of A and columns of B: HetLoRA's cut, and the best
    approximation of its rank where B is 0 or the factors come from an SVD. A client with tensors
    of its own, such as its B, has those in place of the global ones.
    """

    def __init__(
        self, task: Train | TestClients, *, own_b: bool = False, exact: bool = False
    ) -> None:
        """Take the global state and the clients that differ from it.

        Args:
            task: gives both.
            own_b: whether each client has a B of its own: one that has none yet starts from 0.
            exact: take the server's own state, where clients see another one after the download.
        """
        self._task = task
        seen = task.model.sent
        self._state = task.model.state if exact or seen is None else seen
        if own_b:
            factors = self._state.factors.items()
            zero = {n: replace(f, b=np.zeros_like(f.b)) for n, f in factors}
            self._state = replace(self._state, factors=zero)
        self._cut: dict[int, AdapterState] = {}

    def of(self, client: int) -> AdapterState:
        """Return a client's state; of the same `version` for clients of the same rank."""
        own = self._task.personal.get(client)
        if own is not None:
            return _with_own(self._state, own)
        limit = self._task.limits.get(client)
        if limit is None:
            return self._state
        if limit not in self._cut:
            factors = {n: _leading(f, limit) for n, f in self._state.factors.items()}
            self._cut[limit] = replace(self._state, factors=factors)
        return self._cut[limit]


def _with_own(state: AdapterState, own: Mapping[str, FloatArray]) -> AdapterState:
    """Return a state with a client's own tensors, by `named`, or with its own B by module."""
    factors = {
        n: replace(f, a=own.get(A + n, f.a), b=own.get(n, own.get(B + n, f.b)))
        for n, f in state.factors.items()
    }
    return replace(
        state, factors=factors, dense={n: own.get(n, tensor) for n, tensor in state.dense.items()}
    )


def _leading(f: Factors, rank: int) -> Factors:
    return f if f.rank <= rank else Factors(f.a[:rank], f.b[:, :rank], f.scale)


@contextmanager
def attributed(client: int, round_index: int) -> Iterator[None]:
    """Turn whatever a client's training raises into a ClientError that names it.

    A shortage of memory is the block's, not the client's.
    """
    try:
        yield
    except BlockMemoryError:
        raise
    except Exception as error:
        raise ClientError(client, round_index, traceback.format_exc()) from error
