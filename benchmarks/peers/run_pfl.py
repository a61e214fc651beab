"""pfl's native PyTorch simulation; several workers by `torchrun --nproc-per-node N`."""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
parser = argparse.ArgumentParser()
parser.add_argument("--work", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightingStrategy
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from work import Record, Work, trainables

torch.set_num_threads(1)
np.random.seed(0)  # must be equal on all workers
work = Work(args.work)
names = list(work.train)


class Net(torch.nn.Module):
    """The model as pfl asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.m = work.model

    def loss(self, *batch):
        self.m.train()
        return work.loss(dict(zip(names, batch[:-1], strict=True)), batch[-1])

    @torch.no_grad()
    def metrics(self, *batch):
        return {"accuracy": Weighted(round(work.accuracy() * len(batch[-1])), len(batch[-1]))}


def stream():
    """Yield (round, client) in the workload's order; pfl draws one user a call."""
    t = 0
    while True:
        for client in work.cohorts[t % work.rounds].tolist():
            yield t % work.rounds, client
        t += 1


def user(key):
    """Return a client's batches of a round as one data set."""
    rows = torch.from_numpy(work.index(*key)).reshape(-1)
    data = (*(work.train[name][rows] for name in names), work.labels[rows])
    return Dataset(data, user_id=key)


class ByExamples(WeightingStrategy):
    """Weights by the client's true size; the stock one takes the length of what was trained on."""

    def postprocess_one_user(self, *, stats, user_context):
        stats.reweight(int(work.counts[user_context.user_id[1]]))
        return stats, Metrics()


class Rounds(TrainingProcessCallback):
    """Notes the ends of rounds."""

    def __init__(self) -> None:
        self.record = Record(args.out)

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        found = {str(k): v for k, v in aggregate_metrics.to_simple_dict().items()}
        self.record.round_done(found.get("Central val | accuracy", float("nan")))
        return False, Metrics()


net = Net()
model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(trainables(net).values(), lr=1.0))
users = stream()
data = FederatedDataset(user, lambda: next(users))
rounds = Rounds()
test = Dataset((*(work.test[name] for name in names), work.test_labels))
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=work.rounds,
        evaluation_frequency=10**9,
        train_cohort_size=work.cohorts.shape[1],
        val_cohort_size=0,
    ),
    backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[ByExamples()]),
    model=model,
    model_train_params=NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=work.meta["lr"], local_batch_size=16
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
    callbacks=[CentralEvaluationCallback(test), rounds],
)
if get_framework_module().distributed.global_rank == 0:
    rounds.record.save({n.removeprefix("m."): p.detach() for n, p in trainables(net).items()})
if torch.distributed.is_initialized():
    # A worker that just leaves can abort while another still talks to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
