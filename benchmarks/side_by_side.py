"""This project beside Flower, pfl and plain loops, on the same work, interleaved and repeated.

`python side_by_side.py [--workloads W,W3] [--repeats 3] [--runners ...]`: makes each peer's virtual
environment where it is missing, runs every runner in turn, `repeats` times, and writes
results/<workload>.json. Ratios are taken within a repeat: the runners of one repeat ran one after
the other on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

HERE = Path(__file__).parent
ENVIRONMENTS = HERE / ".environments"
MODEL_PACKAGES = ("transformers==5.23.0", "peft==0.21.2", "safetensors", "numpy")
TORCH = "torch==2.13.0"
# What each peer's environment gets beside torch and the model packages.
PEERS = {"flower": ("flwr[simulation]>=1.30",), "pfl": ("pfl[pytorch]>=0.6",)}
SAMPLE_S = 2.0
# Weights of two runners that did the same work differ by float32 rounding only.
SAME_WEIGHTS = 1e-3


@dataclass(frozen=True)
class Runner:
    """A command of the side-by-side.

    Attributes:
        environment: whose Python it takes, `own` for this project's.
        command: after the Python, `--work` and `--out` are added.
        checkout: whose scripts, and whose package, are run.
    """

    environment: str
    command: tuple[str, ...]
    checkout: Path = HERE.parent


# Two threads of one process train, where the others have two processes.
WITHOUT_RAY = "rayfed_lora without Ray"
_LOCAL = ("--set", 'runtime__executor="local"', "--set", "runtime__client_actors=2")
# Both trainers in one actor, where each has an actor of its own else.
ONE_ACTOR = "rayfed_lora in one actor"
_ONE = ("--set", "runtime__client_actors=1", "--set", "runtime__cpus_per_actor=2.0")
# Larger blocks than `auto` takes, which leaves some for more actors than there are here: on W.
_TENS = ("--set", "runtime__cohort_size=10")
TENS = ("rayfed_lora in tens", "rayfed_lora in tens without Ray")
RUNNERS = {
    "rayfed_lora": Runner("own", ("run_rayfed.py",)),
    ONE_ACTOR: Runner("own", ("run_rayfed.py", *_ONE)),
    WITHOUT_RAY: Runner("own", ("run_rayfed.py", *_LOCAL)),
    TENS[0]: Runner("own", ("run_rayfed.py", *_TENS)),
    TENS[1]: Runner("own", ("run_rayfed.py", *_TENS, *_LOCAL)),
    "flower": Runner("flower", ("peers/run_flower.py",)),
    "pfl": Runner(
        "pfl", ("-m", "torch.distributed.run", "--nproc-per-node", "2", "peers/run_pfl.py")
    ),
    "plain": Runner("own", ("peers/run_plain.py",)),
    "plain, 2 processes": Runner("own", ("peers/run_plain.py", "--processes", "2")),
}
OURS = ("rayfed_lora", ONE_ACTOR, WITHOUT_RAY, *TENS)


def python_of(environment: str) -> str:
    """Return the Python of an environment, made if it is missing."""
    if environment == "own":
        return sys.executable
    folder = ENVIRONMENTS / environment
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        packages = (TORCH, *PEERS[environment], *MODEL_PACKAGES)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return str(python)


def versions(environment: str) -> dict[str, str]:
    """Return the versions of what an environment brings to the comparison."""
    names = ["torch", "transformers", "peft", "ray", "flwr", "pfl"]
    code = (
        "import json, importlib.metadata as m\n"
        f"names = {names!r}\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in names if n in found}))"
    )
    done = subprocess.run(
        [python_of(environment), "-c", code], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


class Memory:
    """The largest proportional set size of a process and all that descends from it, sampled.

    Reading it walks every page of a process: twice a second took a tenth of a core from whom it
    watched, the more the more processes those were.
    """

    def __init__(self, root: int) -> None:
        self.peak_bytes = 0
        # Ray's services leave their parent: what once descended is looked at till it ends.
        self._seen, self._stop = {root}, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            parents = {p.pid: p.info["ppid"] for p in psutil.process_iter(["ppid"])}
            self._seen &= set(parents)
            self._seen |= {pid for pid in parents if self._descends(pid, parents)}
            total = 0
            for pid in self._seen:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += psutil.Process(pid).memory_full_info().pss
            self.peak_bytes = max(self.peak_bytes, total)

    def _descends(self, pid: int, parents: dict[int, int]) -> bool:
        while pid in parents and pid not in self._seen:
            pid = parents[pid]
        return pid in self._seen

    def stop(self) -> int:
        """End the watch and return the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak_bytes


def once(runner: Runner, work: Path, scratch: Path) -> dict[str, Any]:
    """Run one runner once; return what was measured."""
    folder = runner.checkout / "benchmarks"
    out = scratch / "out.json"
    command = [python_of(runner.environment), *runner.command]
    scripts = [i for i, part in enumerate(command) if part.endswith(".py")]
    command[scripts[-1]] = str(folder / command[scripts[-1]])
    # Options of the script stand behind it.
    command += ["--work", str(work), "--out", str(out)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [runner.checkout, folder, folder / "peers"])),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    with (scratch / "log").open("w") as log:
        began = time.time()
        process = subprocess.Popen(
            command, env=environment, cwd=scratch, stdout=log, stderr=subprocess.STDOUT
        )
        memory = Memory(process.pid)
        status = process.wait()
        wall_s = time.time() - began
    peak_bytes = memory.stop()
    if status != 0:
        tail = (scratch / "log").read_text()[-3000:]
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{tail}")
    record = json.loads(out.read_text())
    rounds = np.diff(record["ends"])
    round_s = float(np.median(rounds))
    return {
        "round_s": round_s,
        "startup_s": record["ends"][0] - began - round_s,
        "wall_s": wall_s,
        "peak_pss_mb": peak_bytes / 1e6,
        "accuracy": record["accuracy"][-1],
        "weights": load_file(f"{out}.safetensors"),
    }


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the largest relative distance of equally named tensors.

    Raises:
        RuntimeError: they have other names: it is not the same work.
    """
    if set(one) != set(other):
        raise RuntimeError(f"trained tensors differ: {sorted(set(one) ^ set(other))}")
    return max(
        float(np.linalg.norm(one[name] - other[name]) / (np.linalg.norm(other[name]) + 1e-30))
        for name in one
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(name: str, runners: Sequence[str], repeats: int) -> dict[str, Any]:
    """Run all runners on one workload, in turn, several times."""
    found: dict[str, list[dict[str, Any]]] = {runner: [] for runner in runners}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, f"{name}.npz")
        maker = [sys.executable, str(HERE / "workloads.py"), name, str(work)]
        subprocess.run(maker, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        with np.load(work) as arrays:
            cohort = arrays["cohorts"].shape[1]
        for repeat in range(repeats):
            for runner in runners:
                scratch = Path(folder, f"{runner}-{repeat}")
                scratch.mkdir()
                measured = once(RUNNERS[runner], work, scratch)
                measured["clients_per_s"] = cohort / measured["round_s"]
                found[runner].append(measured)
                shutil.rmtree(scratch)
                print(
                    f"{name} {repeat + 1}/{repeats} {runner:20}"
                    f" {measured['clients_per_s']:7.1f} clients/s {measured['round_s']:6.2f} s a"
                    f" round, start {measured['startup_s']:5.1f} s, wall {measured['wall_s']:5.1f}"
                    f" s, {measured['peak_pss_mb']:5.0f} MB, accuracy {measured['accuracy']:.3f}",
                    flush=True,
                )
    reference = found[runners[0]][0]["weights"]
    distances = {r: max(apart(m["weights"], reference) for m in found[r]) for r in runners}
    worst = max(distances, key=distances.__getitem__)
    if distances[worst] > SAME_WEIGHTS:
        raise RuntimeError(f"{worst} ends with other weights: {distances[worst]:.2e} apart")
    return {
        "workload": name,
        "repeats": repeats,
        "machine": {
            "cpus": os.cpu_count(),
            "processor": processor(),
            "python": platform.python_version(),
        },
        "versions": {e: versions(e) for e in {RUNNERS[r].environment for r in runners}},
        "weights_apart": distances,
        "runners": {r: summary_of(found[r]) for r in runners},
        "ratios": {
            ours: {r: ratios(found[ours], found[r]) for r in runners if r not in OURS}
            for ours in OURS
            if ours in runners
        },
    }


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median and spread of what was measured."""
    keys = ("clients_per_s", "round_s", "startup_s", "wall_s", "peak_pss_mb", "accuracy")
    return {key: spread([run[key] for run in runs]) for key in keys}


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return ours by theirs, repeat by repeat: above 1 is faster, or takes more."""
    pairs = list(zip(ours, theirs, strict=True))
    keys = ("clients_per_s", "startup_s", "wall_s", "peak_pss_mb")
    return {key: spread([a[key] / b[key] for a, b in pairs]) for key in keys}


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def main() -> None:
    """Run the comparison and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default="W,W3,W2,W4")
    parser.add_argument(
        "--runners", default=",".join(r for r in RUNNERS if "," not in r and r not in TENS)
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default=str(HERE / "results"))
    parser.add_argument(
        "--before", type=Path, help="a checkout of another version: own runners of it too"
    )
    args = parser.parse_args()
    runners = args.runners.split(",") + ["plain, 2 processes"] * (args.runners.count("plain") > 0)
    if args.before:
        for runner in [runner for runner in runners if runner in OURS]:
            RUNNERS[f"{runner}, before"] = replace(RUNNERS[runner], checkout=args.before.resolve())
            runners.append(f"{runner}, before")
    for runner in runners:
        python_of(RUNNERS[runner].environment)
    for name in args.workloads.split(","):
        result = compare(name, runners, args.repeats)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
