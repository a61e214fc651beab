"""No framework: a PyTorch loop over the clients, in one process or in several."""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os

parser = argparse.ArgumentParser()
parser.add_argument("--work", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--processes", type=int, default=1)

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch
from work import Record, Weights, Work, put, taken


def summed(work: Work, weights: Weights, t: int, clients: list[int]) -> tuple[Weights, int]:
    """Return the sum of n_k w_k over some clients, and that of n_k."""
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    examples = 0
    for client in clients:
        update, n = work.update(weights, t, client)
        for name, tensor in total.items():
            tensor.add_(update[name], alpha=n)
        examples += n
    return total, examples


def worker(pipe, path: str) -> None:
    """Train what comes down the pipe."""
    torch.set_num_threads(1)
    work = Work(path)
    pipe.send(work.model is not None)
    while (message := pipe.recv()) is not None:
        weights, t, clients = message
        total, n = summed(work, {k: torch.from_numpy(v) for k, v in weights.items()}, t, clients)
        pipe.send(({k: v.numpy() for k, v in total.items()}, n))


def main() -> None:
    """Run all rounds."""
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(args.out)
    pipes = []
    if args.processes > 1:
        context = mp.get_context("spawn")
        for _ in range(args.processes):
            mine, theirs = context.Pipe()
            context.Process(target=worker, args=(theirs, args.work), daemon=True).start()
            pipes.append(mine)
    work = Work(args.work)
    weights = taken(work.model)
    for pipe in pipes:
        pipe.recv()
    for t in range(work.rounds):
        cohort = work.cohorts[t].tolist()
        if pipes:
            arrays = {k: v.numpy() for k, v in weights.items()}
            for i, pipe in enumerate(pipes):
                pipe.send((arrays, t, cohort[i :: len(pipes)]))
            parts = [pipe.recv() for pipe in pipes]
            examples = sum(n for _, n in parts)
            sums = {k: sum(torch.from_numpy(part[k]) for part, _ in parts) for k in weights}
        else:
            sums, examples = summed(work, weights, t, cohort)
        weights = {k: v / examples for k, v in sums.items()}
        put(work.model, weights)
        record.round_done(work.accuracy())
    record.save(weights)
    for pipe in pipes:
        pipe.send(None)


if __name__ == "__main__":
    main()
