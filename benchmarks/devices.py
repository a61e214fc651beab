"""What a device of the code gains: one checkout beside another one, in turns, on the same work.

`python devices.py NAME WITH WITHOUT [--ways local,threads,ray] [--workloads W,W3] [--pairs 15]
[--set KEY=VALUE]`: WITH and WITHOUT are checkouts of this repository; `--set` changes the recipe of
WITH alone. Each gets a process that stays, with its imports done and Ray, where it is used,
started; the two run the workload in turns, each first in every other pair. What is compared are the
client updates per second of all rounds, tests included, start-up excluded. The gain is the
geometric mean of the pairs' ratios WITH / WITHOUT, with its 95 % confidence interval (Student's t
on the logarithms). Results are added to `results/devices.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

from scipy import stats

HERE = Path(__file__).parent
# A pair takes about as long as starting Ray's actors: of W half the rounds do.
ROUNDS = {"W": 10, "W3": 5, "W4": 2}
WAYS = {
    "local": {"runtime.executor": "local", "runtime.client_actors": 1},
    "threads": {"runtime.executor": "local", "runtime.client_actors": 2},
    "ray": {"runtime.executor": "ray", "runtime.client_actors": 2},
}
# Runs in the checkout: reads a line of JSON (settings), writes one (updates per second).
WORKER = """
import json, sys, tempfile
import rayfed_lora, workloads
if {ray}:
    import ray
    ray.init(address="local", namespace="rayfed_lora", include_dashboard=False, log_to_driver=False,
             logging_level="ERROR")
print("ready", flush=True)
for line in sys.stdin:
    name, settings = json.loads(line)
    recipe = workloads.recipe(name, **settings)
    with tempfile.TemporaryDirectory() as scratch:
        run = rayfed_lora.run(recipe, scratch + "/run", factory=workloads.BenchmarkFactory())
        rate = run.rounds["clients"].sum() / run.rounds["seconds"].sum()
    print(json.dumps([float(rate), run.summary["adapter_sha256"]]), flush=True)
"""


class Worker:
    """A process that runs workloads with the code of one checkout."""

    def __init__(self, checkout: Path, *, ray: bool) -> None:
        """Start it.

        Args:
            checkout: of this repository.
            ray: whether it starts a Ray of its own.
        """
        path = os.pathsep.join([str(checkout), str(checkout / "benchmarks")])
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER.format(ray=ray)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,  # python -c imports from there first
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; its own error stands above")
        return line

    def run(self, name: str, way: str, rounds: int, own: dict[str, str]) -> tuple[float, str]:
        """Run a workload; return client updates per second, and the adapter's SHA-256."""
        settings = {"annealing.heating.rounds": rounds, **WAYS[way], **own}
        keys = {key.replace(".", "__"): value for key, value in settings.items()}
        print(json.dumps([name, keys]), file=self._process.stdin, flush=True)
        rate, sha256 = json.loads(self._answer())
        return rate, sha256

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def compared(
    checkouts: tuple[Path, Path], name: str, way: str, pairs: int, rounds: int, own: dict[str, str]
) -> dict[str, object]:
    """Run a workload with both checkouts in turns; return the ratios and their interval.

    `own` are settings of the first one alone.
    """
    workers = [Worker(checkout, ray=way == "ray") for checkout in checkouts]
    try:
        # What is only done once (compiling, reading files) is not a matter of the device.
        both = (own, {})
        shas = [w.run(name, way, rounds, s)[1] for w, s in zip(workers, both, strict=True)]
        ratios = []
        for i in range(pairs):
            order = (0, 1) if i % 2 == 0 else (1, 0)
            rate = {which: workers[which].run(name, way, rounds, both[which])[0] for which in order}
            ratios.append(rate[0] / rate[1])
    finally:
        for worker in workers:
            worker.close()
    logs = [math.log(ratio) for ratio in ratios]
    half = stats.t.ppf(0.975, pairs - 1) * stdev(logs) / math.sqrt(pairs)
    low, middle, high = (math.exp(mean(logs) + sign * half) for sign in (-1, 0, 1))
    return {
        "workload": name,
        "way": way,
        "pairs": pairs,
        "rounds": rounds,
        "median": round(median(ratios), 4),
        "gain": round(middle, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "same_bits": shas[0] == shas[1],
        "ratios": [round(ratio, 4) for ratio in ratios],
        "processor": processor(),
    }


def processor() -> str:
    """Return the processor's name and number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    """Measure one device; add what was found to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--ways", default="local,threads,ray")
    parser.add_argument("--workloads", default="W,W3")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rounds", type=int, help="default: fewer than the workload has")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, of WITH alone")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "devices.json")
    args = parser.parse_args()
    own = dict(setting.split("=", 1) for setting in args.set)
    for way in args.ways.split(","):
        for name in args.workloads.split(","):
            rounds = args.rounds or ROUNDS[name]
            found = compared(tuple(args.checkouts), name, way, args.pairs, rounds, own)
            kept = json.loads(args.results.read_text()) if args.results.exists() else []
            kept.append({"device": args.name, **found} | ({"settings": own} if own else {}))
            args.results.write_text("".join(["[\n", ",\n".join(map(json.dumps, kept)), "\n]\n"]))
            low, high = found["low"], found["high"]
            print(
                f"{args.name} {name} {way}: {found['gain']:.3f} ({low:.3f}-{high:.3f})", flush=True
            )


if __name__ == "__main__":
    main()
