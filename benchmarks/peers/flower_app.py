"""Flower's ServerApp and ClientApp, message API. Imported by name, so that its Ray actors keep the
model between calls."""

from __future__ import annotations

import os

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from work import Record, Work, put, taken

client_app, server_app = ClientApp(), ServerApp()
_WORK: dict[str, Work] = {}


def work_of(path: str) -> Work:
    """Return the workload, read once a process."""
    if path not in _WORK:
        torch.set_num_threads(1)
        _WORK[path] = Work(path)
    return _WORK[path]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client."""
    config = message.content["config"]
    work = work_of(config["work"])
    weights = message.content["arrays"].to_torch_state_dict()
    update, n = work.update(weights, config["round"], config["client"])
    content = RecordDict(
        {"arrays": ArrayRecord(update), "metrics": MetricRecord({"num-examples": n})}
    )
    return Message(content=content, reply_to=message)


class CohortFedAvg(FedAvg):
    """FedAvg with the workload's cohorts: the stock one samples with `random`."""

    def __init__(self, work: Work, path: str, **settings) -> None:
        super().__init__(fraction_evaluate=0.0, **settings)
        self.work, self.path = work, path

    def configure_train(self, server_round, arrays, config, grid):
        """Send the global weights to the cohort."""
        cohort = self.work.cohorts[server_round - 1].tolist()
        for node, client in zip(list(grid.get_node_ids()), cohort, strict=False):
            facts = {"client": client, "round": server_round - 1, "work": self.path}
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(facts)})
            yield Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    torch.set_num_threads(1)
    path = os.environ["BENCH_WORK"]
    work, record = work_of(path), Record(os.environ["BENCH_OUT"])

    def evaluate(server_round, arrays):
        if server_round == 0:
            return None
        put(work.model, arrays.to_torch_state_dict())
        record.round_done(work.accuracy())
        return MetricRecord({"accuracy": record.accuracy[-1]})

    strategy = CohortFedAvg(work, path, min_available_nodes=work.clients)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(taken(work.model)),
        num_rounds=work.rounds,
        evaluate_fn=evaluate,
    )
    record.save(result.arrays.to_torch_state_dict())
