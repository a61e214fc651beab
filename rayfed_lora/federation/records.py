"""Rows of a run's tables (docs/design.md, "The run folder")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Annotated, Any, Literal

from rayfed_lora.data.prompts import Answer, PromptFacts
from rayfed_lora.federation.bills import Bill
from rayfed_lora.federation.client_training import Updates
from rayfed_lora.federation.cohorts import Cohort
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.generation import exact_match, rouge_l
from rayfed_lora.federation.model_tests import TestResults
from rayfed_lora.federation.run import Aggregated
from rayfed_lora.federation.transitions import Start
from rayfed_lora.lora.states import dense_params, factor_params
from rayfed_lora.types import ClientReport, LocalPlan, Proposal, RoundPlan, Stage

# Kept as 32 bits in the tables; a plain int has 64.
Count = Annotated[int, 32]


@dataclass(frozen=True)
class Round:
    """A finished round: everything that its rows are made of.

    Attributes:
        error: relative error of the aggregate, None without factors.
        tested: scores of the new global model.
        seconds: wall time, tests included.
        epsilon: after the round; None without privacy.
        training_s: wall time of training and aggregation alone.
    """

    plan: RoundPlan
    local: LocalPlan
    start: Start
    cohort: Cohort
    updates: Updates
    aggregated: Aggregated
    bill: Bill
    error: float | None
    tested: TestResults
    seconds: float
    epsilon: float | None = None
    training_s: float = 0.0

    @property
    def reports(self) -> Sequence[ClientReport]:
        """One report per client, in the order of the cohort."""
        return self.updates.reports

    @property
    def ranks(self) -> Mapping[str, int] | None:
        """Rank by module; None in a full-model round."""
        return None if self.plan.trainable == "full" else self.start.resizing.ranks

    @property
    def train_loss(self) -> float:
        """Mean over clients, weighted by examples; nan where no update came."""
        usable = [report for report in self.reports if report.usable]
        examples = sum(report.examples for report in usable)
        loss = math.fsum(report.train_loss * report.examples for report in usable)
        return loss / examples if usable else math.nan

    @property
    def trainable_params(self) -> int:
        """Number of values that a client trains."""
        state = self.start.model.state
        return factor_params(state, self.local.frozen) + dense_params(state)

    @property
    def tokens(self) -> int | None:
        """Tokens that the clients have trained on; None but in language models."""
        return sum(report.tokens for report in self.reports) or None

    @property
    def tokens_per_s(self) -> float | None:
        """The same in a second of training and aggregation."""
        return None if self.tokens is None else self.tokens / max(self.training_s, 1e-9)


def column(of: Callable[[Round], Any], **default: Any) -> Any:
    """Return a field of `RoundRecord` whose value `of` computes from the round."""
    return field(metadata={"of": of}, **default)


def _mean_rank(r: Round) -> float | None:
    return None if r.ranks is None else math.fsum(r.ranks.values()) / max(len(r.ranks), 1)


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """A row of rounds.parquet; each field is a column, and `evaluation` one for each metric.

    Attributes:
        round: index from 0.
        rank: uniform rank, or the mean over modules; None in a full-model round.
        ranks: rank by module; None in a full-model round.
        trainable_params: number of values that a client trains.
        proximal_weight: mu.
        clients: size of the cohort.
        failed_clients: number of them without a usable update.
        train_loss: mean over clients, weighted by examples; nan where no update came.
        evaluation: metrics of the new global model on the test split, `eval_<name>` in the table;
            None where not tested or not defined.
        validation_accuracy, validation_loss: on the server's validation split.
        aggregation_error: ||D_used - D_exact||_F / ||D_exact||_F, None without factors.
        params_up, params_down: values sent by and to the cohort, base not included.
        bytes_up, bytes_down: the same in bytes, as encoded by `wire`.
        bytes_base: bytes of frozen base sent to participants that did not hold the current one.
        proposal: the annealing's proposal and verdict; columns of its own in the table.
        seconds: wall time of the round, evaluation included.
        dropped_clients: how many left or came too late, by the simulated clock.
        retried_blocks: how often a block was rerun because its actor or its result was lost.
        simulated_s: length of the round by the simulated clock, waiting for clients included; None
            where no time is simulated.
        epsilon: of client-level privacy up to this round; None without privacy.
        tokens: that the clients have trained on, padding left out; None but in language models.
        tokens_per_s: the same in a second of training and aggregation.
        peak_memory_mb: largest memory so far of a process that trained a client of the round (of a
            GPU: what torch has reserved), 10^6 bytes; None but in language models.
    """

    round: Count = column(lambda r: r.plan.round)
    stage: Stage = column(lambda r: r.plan.stage)
    rank: float | None = column(_mean_rank)
    ranks: Mapping[str, int] | None = column(lambda r: r.ranks)
    trainable_params: int = column(lambda r: r.trainable_params)
    proximal_weight: float = column(lambda r: r.plan.proximal_weight)
    clients: Count = column(lambda r: len(r.reports))
    failed_clients: Count = column(lambda r: sum(c.error is not None for c in r.reports))
    train_loss: float = column(lambda r: r.train_loss)
    evaluation: Scores = column(lambda r: r.tested.test or {})
    aggregation_error: float | None = column(lambda r: r.error)
    params_up: int = column(lambda r: r.bill.params_up)
    params_down: int = column(lambda r: r.bill.params_down)
    bytes_up: int = column(lambda r: int(r.bill.sent_up.sum()))
    bytes_down: int = column(lambda r: int(r.bill.sent_down.sum()))
    bytes_base: int = column(lambda r: int(r.bill.sent_base.sum()))
    seconds: float = column(lambda r: r.seconds)
    learning_rate: float = column(lambda r: r.local.lr)
    validation_accuracy: float | None = column(
        lambda r: r.tested.validation and r.tested.validation["accuracy"], default=None
    )
    validation_loss: float | None = column(
        lambda r: r.tested.validation and r.tested.validation["loss"], default=None
    )
    proposal: Proposal | None = column(lambda r: r.plan.proposal, default=None)
    dropped_clients: Count = column(
        lambda r: sum(c.absent is not None for c in r.reports), default=0
    )
    retried_blocks: Count = column(lambda r: r.updates.reruns, default=0)
    simulated_s: float | None = column(lambda r: r.cohort.lasted_s, default=None)
    epsilon: float | None = column(lambda r: r.epsilon, default=None)
    tokens: int | None = column(lambda r: r.tokens, default=None)
    tokens_per_s: float | None = column(lambda r: r.tokens_per_s, default=None)
    peak_memory_mb: float | None = column(
        lambda r: max((c.peak_mb for c in r.reports), default=0.0) or None, default=None
    )

    @classmethod
    def of(cls, finished: Round) -> RoundRecord:
        """Return the row of a round."""
        return cls(**{each.name: each.metadata["of"](finished) for each in fields(cls)})

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the test split, None where not tested."""
        return self.evaluation.get("accuracy")


@dataclass(frozen=True)
class ClientRecord:
    """A row of clients.parquet: one client in one round.

    Attributes:
        round: index from 0.
        examples: number of its training examples.
        train_loss: mean loss over its local steps, None where it failed.
        status: `dropped` and `late` are by the simulated clock.
        bytes_up, bytes_down: the part of its messages that was sent, base not included.
        seconds: its local training time.
        simulated_s: by the simulated clock, from the start of the round until its update arrived or
            the server stopped waiting for it; None where no time is simulated.
        lr, local_steps, batch_size: its own settings; columns of the table only where they differ
            between clients, None where they do not.
    """

    round: Count
    client: int
    examples: int
    train_loss: float | None
    status: Literal["ok", "failed", "dropped", "late"]
    error: str | None
    bytes_up: int
    bytes_down: int
    seconds: float
    simulated_s: float | None = None
    lr: float | None = None
    local_steps: int | None = None
    batch_size: int | None = None


def client_records(finished: Round) -> list[ClientRecord]:
    """Return the row of every client of a round."""
    reports, bill, turnout = finished.reports, finished.bill, finished.cohort.turnout
    times = [None] * len(reports) if turnout is None else turnout.seconds.tolist()
    own: dict[int, dict[str, Any]] = {
        k: {"lr": each.lr, "local_steps": each.steps, "batch_size": each.batch_size}
        for k, each in finished.local.own.items()
    }
    rows = zip(reports, bill.sent_up.tolist(), bill.sent_down.tolist(), times, strict=True)
    return [
        ClientRecord(
            round=finished.plan.round,
            client=report.client,
            examples=report.examples,
            train_loss=report.train_loss if report.usable else None,
            status=report.absent or ("ok" if report.error is None else "failed"),
            error=report.error,
            bytes_up=up,
            bytes_down=down,
            seconds=report.seconds,
            simulated_s=simulated_s,
            **own.get(report.client, {}),
        )
        for report, up, down, simulated_s in rows
    ]


@dataclass(frozen=True)
class ClientTest:
    """A row of client_metrics.parquet: one client's own held-out examples after one round.

    `accuracy` and `loss` are the global model's, `personal_*` the client's own model's, if any.
    """

    round: Count
    client: int
    examples: int
    accuracy: float
    loss: float
    personal_accuracy: float | None = None
    personal_loss: float | None = None


def client_tests(finished: Round) -> list[ClientTest]:
    """Return the row of every client that was tested after a round."""
    own = {each.client: (each.accuracy, each.loss) for each in finished.tested.own}
    return [
        ClientTest(finished.plan.round, *astuple(score), *own.get(score.client, (None, None)))
        for score in finished.tested.clients
    ]


@dataclass(frozen=True)
class AnswerRecord:
    """A row of answers.parquet: a language model's answer to a prompt of the test split.

    Attributes:
        round: index from 0.
        example: place of the prompt among those that are asked.
        client, domain: whose row it is, where the data say so.
        prompt, response: of the data.
        generated: the answer, without its end token.
        exact_match: whether it is the response but for white space at its ends.
        rouge_l: against the response, in [0, 1].
    """

    round: Count
    example: int
    client: str | None
    domain: str | None
    prompt: str
    response: str
    generated: str
    exact_match: bool
    rouge_l: float


def answer_records(
    round_index: int, answers: Sequence[Answer], facts: PromptFacts
) -> list[AnswerRecord]:
    """Return the rows of the answers after a round."""
    return [
        AnswerRecord(
            round=round_index,
            example=each.example,
            client=None if facts.clients is None else facts.clients[each.example],
            domain=None if facts.domains is None else facts.domains[each.example],
            prompt=each.prompt,
            response=each.response,
            generated=each.generated,
            exact_match=exact_match(each),
            rouge_l=rouge_l(each.generated, each.response),
        )
        for each in answers
    ]


@dataclass(frozen=True)
class Note:
    """A row of notes.parquet: a message for the user on a round, e.g. on a lost actor."""

    round: Count
    text: str
