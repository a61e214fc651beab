"""Runs that are killed or stopped and gone on with end as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.e2e.processes import (
    command,
    environment,
    finish,
    kill,
    lives,
    rounds_saved,
    started,
    wait_for,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# Eight rounds through all four stages, each long enough to be hit in its middle.
ROUNDS = 8
RECIPE = """\
name: interrupted
data: {source: digits, max_examples: 200, partition: {clients: 8}}
model:
  config: {architecture: vit, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2,
    intermediate_size: 24, patch_size: 2}
annealing:
  initiating: {rounds: 2}
  heating: {rounds: 2, rank: 4}
  cooling: {rounds: 2, rank: 1, shape: linear, residual: fold}
  holding: {rounds: 2}
clients: {per_round: 4, local_steps: 12, batch_size: 8, optimizer: {name: adamw, lr: 0.01}}
runtime: {device: cpu, client_actors: 1}
"""
EXECUTORS = [
    pytest.param("local", id="local"),
    pytest.param("ray", id="ray", marks=pytest.mark.ray),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "interrupted.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(*arguments(recipe, out, "local"))
    return out


def arguments(recipe: Path, out: Path, executor: str, *more: str) -> list[str]:
    chosen = ["--set", f"runtime.executor={executor}"]
    return ["run", str(recipe), "--out", str(out), *chosen, *more]


def rounds_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "rounds.parquet").drop(columns="seconds")


def clients_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "clients.parquet").drop(columns="seconds")


def assert_same_run(out: Path, expected: Path) -> None:
    one, other = (json.loads((f / "summary.json").read_text()) for f in (out, expected))
    assert one["rounds"] == ROUNDS
    for key in ("adapter_sha256", "final", "best", "communication"):
        assert one[key] == other[key]
    pd.testing.assert_frame_equal(rounds_of(out), rounds_of(expected), check_exact=True)
    pd.testing.assert_frame_equal(clients_of(out), clients_of(expected), check_exact=True)
    for name in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_killed_again_and_again_ends_as_one_left_alone(
    executor: str, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    resume: Sequence[str] = ()
    # After the first round; in the middle of one (of the next stage, on a replaced base); at the
    # end, when the last checkpoint is there and the export is not.
    for rounds, pause_s in ((1, 0.0), (4, 0.15), (ROUNDS, 0.0)):
        with started(command(*arguments(recipe, out, executor, *resume))) as process:
            wait_for(rounds_saved(out, rounds), process)
            time.sleep(pause_s)
            kill(process)
        assert process.returncode == -signal.SIGKILL
        resume = ["--resume"]
    assert not (out / "summary.json").exists()
    finish(*arguments(recipe, out, executor, *resume))
    assert_same_run(out, undisturbed)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with started(command(*arguments(recipe, out, "local"))) as process:
        wait_for((out / "recipe.yaml").exists, process)
        kill(process)
    assert not (out / "checkpoints").exists()
    finish(*arguments(recipe, out, "local", "--resume"))
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_interrupted_run_keeps_its_rounds_and_goes_on(
    executor: str, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with started(command(*arguments(recipe, out, executor))) as process:
        wait_for(rounds_saved(out, 2), process)
        # As a terminal does it: to every process of the group.
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"to resume: rayfed-lora run {out} --resume" in err
    assert "Traceback" not in err
    assert rounds_saved(out, 2)()
    assert not (out / "summary.json").exists()
    finish(*arguments(recipe, out, executor, "--resume"))
    assert_same_run(out, undisturbed)


def test_a_killed_run_is_not_started_again_by_mistake(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started(command(*arguments(recipe, out, "local"))) as process:
        wait_for(rounds_saved(out, 1), process)
        kill(process)
    kept = files(out)
    done = subprocess.run(
        command(*arguments(recipe, out, "local")),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert files(out) == kept


@pytest.mark.ray
def test_when_its_starter_alone_is_killed_a_run_on_ray_ends_and_can_be_gone_on_with(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with started(command(*arguments(recipe, out, "ray"))) as process:
        wait_for(rounds_saved(out, 2), process)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        try:
            wait_until(lambda: not any(map(lives, family)))
        finally:
            for member in filter(lives, family):
                member.kill()
    assert not (out / "summary.json").exists()
    finish(*arguments(recipe, out, "local", "--resume"))
    assert_same_run(out, undisturbed)
