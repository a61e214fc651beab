"""This project on a workload, as a user runs it: `rayfed_lora.run`, on Ray or without."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import workloads

import rayfed_lora


def main() -> None:
    """Run; write when each round ended, and the final weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    name = Path(args.work).stem
    settings = dict(item.split("=", 1) for item in args.set)
    recipe = workloads.recipe(name, **{key: json.loads(value) for key, value in settings.items()})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        result = rayfed_lora.run(recipe, out=str(folder), factory=workloads.BenchmarkFactory())
        # The folder's recipe is written when all actors are open, just before the first round.
        opened = os.path.getmtime(folder / "recipe.yaml")
        seconds = result.rounds["seconds"].to_numpy()
        weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        Path(args.out + ".safetensors").write_bytes(weights)
        ends = (opened + seconds.cumsum()).tolist()
        accuracy = result.rounds["eval_accuracy"].tolist()
        Path(args.out).write_text(json.dumps({"ends": ends, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
