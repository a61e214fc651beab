"""How much of a round the client actors compute: `python overhead.py [--workloads W,W/local]`.

Computing is forward, loss, backward and optimiser step, and predictions of an evaluation, on the
wall clock of the actors or threads. Everything else (reading batches, loading and reading adapters,
messages, waiting for the server or for each other) is overhead: 1 - computing / (workers x time),
from the end of the first round to the end of the last. `W/local` is W without Ray, in two threads
of one process, where a wait for Python's lock inside of what computes is not seen; `W/one` is W in
one actor of two threads; `W/10` is W in blocks of ten clients in place of those of `auto`;
`W3/long`, or `W3/one/long`, is W3 with 20 rounds in place of five, of which four are measured in
two seconds: a stall of one core of a tenth of a second is 2.5 % of that. Writes
results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import workloads
from side_by_side import HERE, processor, versions

import rayfed_lora
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import Trainer

WORKERS = 2
LONG = 20


class Spans:
    """When a thread computed: in a file that is mapped, which outlives a process that is killed."""

    _MOST = 1 << 17

    def __init__(self, folder: str) -> None:
        """Begin a file of the calling thread's."""
        path = Path(folder, f"{os.getpid()}-{threading.get_ident()}")
        self._spans = np.memmap(path, np.float64, "w+", shape=(self._MOST, 2))
        self._count = 0

    def add(self, began: float, end: float) -> None:
        """Write one down: a system call for each would be seen in what is measured."""
        self._spans[self._count] = began, end
        self._count += 1

    @staticmethod
    def read(folder: str) -> np.ndarray:
        """Return the spans of all threads, (spans, 2), in seconds since 1970."""
        files = [np.fromfile(path, np.float64).reshape(-1, 2) for path in Path(folder).iterdir()]
        spans = np.concatenate(files)
        return spans[spans[:, 1] > 0]


class TracingFactory(workloads.BenchmarkFactory):
    """The benchmark's, with trainers that write down when they compute."""

    def __init__(self, folder: str) -> None:
        """Let every thread write to a file of its own in `folder`."""
        self.folder = folder
        # By thread.
        self.spans: dict[int, Spans] = {}
        self.times_steps = False

    def trainer(self, recipe: Recipe, *made_from: Any) -> Trainer:
        """Build the trainer and time what it has torch compute."""
        import torch

        from rayfed_lora.training import trainer as training

        trainer = super().trainer(recipe, *made_from)

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def measured(*args: Any, **named: Any) -> Any:
                began = time.time()
                try:
                    return call(*args, **named)
                finally:
                    end, thread = time.time(), threading.get_ident()
                    if thread not in self.spans:
                        self.spans[thread] = Spans(self.folder)
                    self.spans[thread].add(began, end)

            return measured

        # Forward and loss; of an evaluation all but loading.
        trainer._gradients.losses = timed(trainer._gradients.losses)
        if not self.times_steps:
            # Once a run in a process, for all its trainers.
            make = getattr(training.fresh_optimizer, "untimed", training.fresh_optimizer)

            def optimizer(*args: Any) -> Any:
                made = make(*args)
                made.step = timed(made.step)
                return made

            optimizer.untimed = make
            training.fresh_optimizer = optimizer
            backward = getattr(torch.Tensor.backward, "__wrapped__", torch.Tensor.backward)
            torch.Tensor.backward = wraps(backward)(timed(backward))
            self.times_steps = True
        trainer._testing.predictions = timed(trainer._testing.predictions)
        return trainer


def overhead(name: str) -> float:
    """Return the share of the rounds after the first that is not computing."""
    workload, *variants = name.split("/")
    changes: dict[str, Any] = {"runtime__client_actors": WORKERS}
    for variant in variants:
        if variant == "local":
            changes["runtime__executor"] = variant
        elif variant == "one":
            changes |= {"runtime__client_actors": 1, "runtime__cpus_per_actor": float(WORKERS)}
        elif variant == "long":
            changes["annealing__heating__rounds"] = LONG
        else:
            changes["runtime__cohort_size"] = int(variant)
    recipe = workloads.recipe(workload, **changes)
    with tempfile.TemporaryDirectory() as traces, tempfile.TemporaryDirectory() as out:
        folder = Path(out, "run")
        result = rayfed_lora.run(recipe, out=str(folder), factory=TracingFactory(traces))
        # The folder's recipe is written when all actors are open, just before the first round.
        opened = os.path.getmtime(folder / "recipe.yaml")
        ends = opened + result.rounds["seconds"].to_numpy().cumsum()
        first, last = float(ends[0]), float(ends[-1])
        spans = Spans.read(traces).clip(first, last)
    computing = float((spans[:, 1] - spans[:, 0]).sum())
    return 1 - computing / (WORKERS * (last - first))


def main() -> None:
    """Measure the workloads in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workloads", default="W,W/one,W/local,W3,W3/long,W3/one/long,W3/local/long,W2,W4"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in args.workloads.split(",")}
    for _ in range(args.repeats):
        for name, shares in found.items():
            shares.append(overhead(name))
            print(f"{name}: {shares[-1]:.1%} of a round is overhead", flush=True)
    medians = {name: statistics.median(shares) for name, shares in found.items()}
    content = {
        "overhead": found,
        "median": medians,
        "processor": processor(),
        "versions": versions("own"),
    }
    (HERE / "results" / "overhead.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
