"""Rows of a run's tables. Source: this project (docs/design.md, "The run folder")."""

from __future__ import annotations

import math
from dataclasses import replace

from rayfed_lora.federation.devices import Turnout
from rayfed_lora.federation.evaluation import Scores
from rayfed_lora.federation.ledger import BYTES_A_VALUE, Bill
from rayfed_lora.federation.transitions import Entry
from rayfed_lora.lora.counting import dense_params, factor_params
from rayfed_lora.types import (
    ClientRecord,
    ClientScore,
    ClientTest,
    ClientUpdate,
    Frozen,
    RoundPlan,
    RoundRecord,
)


def round_record(
    plan: RoundPlan,
    entry: Entry,
    frozen: Frozen | None,
    lr: float,
    updates: list[ClientUpdate],
) -> RoundRecord:
    """Return a round's row, without the aggregate's error, bill, scores, seconds and retries.

    Args:
    plan: the round.
    entry: the model that its clients started from.
    frozen: the factor that they did not train.
    lr: their learning rate.
    updates: what came of them.
    """
    usable = [update for update in updates if update.usable]
    failed = sum(update.error is not None for update in updates)
    examples = sum(update.examples for update in usable)
    loss = math.fsum(update.train_loss * update.examples for update in usable)
    ranks = dict(entry.ranks) if plan.trainable == "adapter" else None
    state = entry.model.state
    return RoundRecord(
        round=plan.round,
        stage=plan.stage,
        rank=None if ranks is None else math.fsum(ranks.values()) / max(len(ranks), 1),
        ranks=ranks,
        trainable_params=factor_params(state, frozen) + dense_params(state),
        proximal_weight=plan.proximal_weight,
        clients=len(updates),
        failed_clients=failed,
        train_loss=loss / examples if usable else math.nan,
        eval_accuracy=None,
        eval_loss=None,
        eval_macro_f1=None,
        eval_auc=None,
        eval_perplexity=None,
        validation_accuracy=None,
        validation_loss=None,
        aggregation_error=None,
        params_up=0,
        params_down=0,
        bytes_up=0,
        bytes_down=0,
        bytes_base=0,
        learning_rate=lr,
        proposal=plan.proposal,
        dropped_clients=sum(update.absent is not None for update in updates),
        seconds=0.0,
    )


def finished(
    record: RoundRecord,
    bill: Bill,
    tested: Scores | None,
    validation: Scores | None,
    seconds: float,
) -> RoundRecord:
    """Return the row with what was sent, the scores of its model and the seconds that it took."""
    return replace(
        record,
        params_up=bill.params_up,
        params_down=bill.params_down,
        bytes_up=bill.params_up * BYTES_A_VALUE,
        bytes_down=bill.params_down * BYTES_A_VALUE,
        bytes_base=bill.base_params * BYTES_A_VALUE,
        eval_accuracy=None if tested is None else tested.accuracy,
        eval_loss=None if tested is None else tested.loss,
        eval_macro_f1=None if tested is None else tested.macro_f1,
        eval_auc=None if tested is None else tested.auc,
        eval_perplexity=None if tested is None else tested.perplexity,
        validation_accuracy=None if validation is None else validation.accuracy,
        validation_loss=None if validation is None else validation.loss,
        seconds=seconds,
    )


def client_test(t: int, score: ClientScore, own: ClientScore | None) -> ClientTest:
    """Return how the global model, and the client's own, do on its examples."""
    return ClientTest(
        round=t,
        client=score.client,
        examples=score.examples,
        accuracy=score.accuracy,
        loss=score.loss,
        personal_accuracy=None if own is None else own.accuracy,
        personal_loss=None if own is None else own.loss,
    )


def client_records(
    t: int, updates: list[ClientUpdate], bill: Bill, turnout: Turnout | None = None
) -> list[ClientRecord]:
    """Return the row of every client of a round.

    Args:
        t: index of the round.
        updates: a report of each client of the cohort.
        bill: what was sent.
        turnout: by the simulated clock; None where there is none.
    """
    times = [None] * len(updates) if turnout is None else turnout.seconds.tolist()
    sent = zip(bill.up.tolist(), bill.down.tolist(), times, strict=True)
    return [
        ClientRecord(
            round=t,
            client=update.client,
            examples=update.examples,
            train_loss=update.train_loss if update.usable else None,
            status=update.absent or ("ok" if update.error is None else "failed"),
            error=update.error,
            bytes_up=up * BYTES_A_VALUE,
            bytes_down=down * BYTES_A_VALUE,
            seconds=update.seconds,
            simulated_s=simulated_s,
        )
        for update, (up, down, simulated_s) in zip(updates, sent, strict=True)
    ]
