"""Whether two checkouts of this repository compute the same: bit by bit, on many small recipes.

`python same_bits.py OLD NEW [--only REGEX] [--executors local,threads,ray] [--accept REGEX]`: each
checkout gets a process that stays for each executor, and both run the cases of
`same_bits_cases.py` at the same time. Compared are `adapter_sha256` and all columns of all tables
but times and texts. A line a case says: same | both reject (with the same message) | skipped (data
that are not installed) | DIFFERENT (in what) | only one of them failed. The status is 1 unless all
cases are the same, rejected alike, skipped or accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from same_bits_cases import Case, table

EXECUTORS = {
    "local": {"runtime.executor": "local", "runtime.client_actors": 1},
    "threads": {"runtime.executor": "local", "runtime.client_actors": 2},
    "ray": {"runtime.executor": "ray", "runtime.client_actors": 2},
}
# A case on Ray takes seconds: these, unless --all-on-ray.
ON_RAY = re.compile(
    r"shipped digits-vit|plain|clients apart.*|folding, spectral.*|some clients tested"
    r"|rule share-a, tested on clients|text-classification, dropout.*|causal-lm, plain"
)
# Runs in the checkout: reads a line of JSON (a case), writes one (its outcome).
WORKER = """
import json, pathlib, sys, tempfile
answers, sys.stdout = sys.stdout, sys.stderr
import pandas, rayfed_lora
if {ray}:
    import ray
    ray.init(address="local", num_cpus=2, namespace="rayfed_lora", include_dashboard=False,
             log_to_driver=False, logging_level="ERROR")
def outcome(base, settings, scratch):
    try:
        done = rayfed_lora.run(rayfed_lora.load_recipe(base, settings), scratch + "/run")
    except Exception as error:
        text = f"{{type(error).__name__}}: {{error}}"
        return {{"error": text.replace(scratch, "FOLDER")}}
    tables = {{path.stem: pandas.read_parquet(path)
               for path in pathlib.Path(done.location).glob("*.parquet")}}
    columns = {{f"{{name}}.{{key}}": [repr(value) for value in table[key].tolist()]
                for name, table in tables.items() for key in table}}
    return {{"sha256": done.summary["adapter_sha256"], "columns": columns}}
for line in sys.stdin:
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(outcome(*json.loads(line), scratch)), file=answers, flush=True)
"""
# Times, and texts that may be worded anew.
NOT_RESULTS = re.compile(r".*\.(seconds|error)|notes\..*")
MISSING = re.compile(r"no such file|not installed")
OTHER_WORDS = "both reject, in other words"
GOOD = ("same", "both reject", "skipped", "accepted")


@dataclass(frozen=True)
class Outcome:
    """What a run gave: its adapter and tables, or the error that rejected it."""

    sha256: str = ""
    columns: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""


class Worker:
    """A process that runs cases with the code of one checkout."""

    def __init__(self, checkout: Path, *, ray: bool) -> None:
        """Start the process; `ray`: with a Ray of its own."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER.format(ray=ray)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
        )

    def start(self, case: Case, executor: str) -> None:
        """Begin a case; `outcome` waits for it."""
        settings = {**case.settings, "runtime.device": "cpu", **EXECUTORS[executor]}
        print(json.dumps([case.recipe, settings]), file=self._process.stdin, flush=True)

    def outcome(self) -> Outcome:
        """Return the outcome of the case that was begun."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; its own error stands above")
        return Outcome(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def verdict(old: Outcome, new: Outcome) -> tuple[str, str]:
    """Return what two outcomes are to each other, and what is to be said of it."""
    if old.error or new.error:
        if not (old.error and new.error):
            return f"only {'OLD' if old.error else 'NEW'} failed", old.error or new.error
        if old.error != new.error:
            return OTHER_WORDS, f"{old.error} | {new.error}"
        return "skipped" if MISSING.search(old.error) else "both reject", old.error
    names = [name for name in {**old.columns, **new.columns} if not NOT_RESULTS.fullmatch(name)]
    differing = [] if old.sha256 == new.sha256 else ["adapter_sha256"]
    differing += [name for name in names if old.columns.get(name) != new.columns.get(name)]
    return "DIFFERENT" if differing else "same", ", ".join(differing)


def main() -> None:
    """Run the cases; print a line for each, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=lambda path: Path(path).resolve())
    parser.add_argument("--only", default="", help="cases whose name this is found in")
    parser.add_argument("--executors", default="local,threads,ray")
    parser.add_argument("--all-on-ray", action="store_true", help="not only a few cases")
    parser.add_argument(
        "--accept", action="append", default=[], help="name of a deliberate change, or a pattern"
    )
    parser.add_argument(
        "--accept-words", action="store_true", help="what both reject, in other words too"
    )
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as texts:
        cases = table(args.checkouts, Path(texts))
        for executor in args.executors.split(","):
            workers = [Worker(path, ray=executor == "ray") for path in args.checkouts]
            few = executor == "ray" and not args.all_on_ray
            for name, case in cases.items():
                if not re.search(args.only, name) or (few and not ON_RAY.fullmatch(name)):
                    continue
                for worker in workers:
                    worker.start(case, executor)
                found, why = verdict(*[worker.outcome() for worker in workers])
                deliberate = any(re.fullmatch(pattern, name) for pattern in args.accept)
                if found == OTHER_WORDS:
                    deliberate = deliberate or args.accept_words
                if found not in GOOD and deliberate:
                    found, why = "accepted", f"{found}: {why}"
                counts[found] += 1
                line = f"{executor:8}{name:44}{found}" + (f": {why}" if why else "")
                print(" ".join(line.splitlines()), flush=True)
            for worker in workers:
                worker.close()
    print(", ".join(f"{count} {found}" for found, count in counts.items()) or "no case")
    sys.exit(0 if counts and set(counts) <= set(GOOD) else 1)


if __name__ == "__main__":
    main()
