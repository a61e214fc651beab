"""Runs as jobs of a real Ray head with a token: watched, stopped, gone on with, examined."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.e2e.processes import PROGRAM
from tests.heads import TOKEN, Head, running_head

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.timeout(900)]

RECIPE = """\
name: small
data: {source: digits, max_examples: 120, partition: {clients: 6}}
model:
  config: {architecture: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
    intermediate_size: 24, patch_size: 4}
annealing:
  initiating: {rounds: 1}
  heating: {rounds: 4, rank: 3}
  cooling: {rounds: 30, rank: 1}
  holding: {rounds: 5}
clients: {per_round: 4, local_steps: 50, batch_size: 8}
runtime: {client_actors: 1}
"""
ROUNDS = 40
WAIT_S = 300.0

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as found:
        yield found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def command(head: Head) -> Command:
    """Run a command against the head; its output holds no token."""

    def run(name: str, *arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", PROGRAM, name, *map(str, arguments)]
        done = subprocess.run(
            [*words, "--address", head.dashboard],
            env={**head.environment, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def job_of(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.split("job: ")[1].split()[0]


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def client_actors(head: Head) -> list[psutil.Process]:
    """Return the client actors of the head's runs."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        name = " ".join(each.info["cmdline"] or ())
        with suppress(psutil.Error):
            if name.startswith(("ray::ClientActor", "ray::client", "ray::round", "ray::evaluate")):
                if each.environ().get("HOME") == str(head.home):
                    found.append(each)
    return found


@contextmanager
def slowed(head: Head) -> Iterator[None]:
    """Let the client actors of a head work a twentieth of the time: a run takes minutes.

    Not stopped for good: a stopped run waits for the block that is being trained.
    """
    actors, done = client_actors(head), threading.Event()
    assert actors

    def each(what: str) -> None:
        for actor in actors:
            with suppress(psutil.NoSuchProcess):
                getattr(actor, what)()

    def slow() -> None:
        while not done.is_set():
            each("suspend")
            done.wait(0.95)
            each("resume")
            done.wait(0.05)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/round-*"))


def sha256(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["adapter_sha256"])


def test_a_stopped_job_keeps_its_checkpoint_and_resumes_to_the_result_of_an_undisturbed_one(
    command: Command, head: Head, recipe: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = command("submit", recipe, "--out", whole, "--follow")
    assert f"round {ROUNDS}/{ROUNDS}  holding" in done.stdout
    assert "run folder:" in done.stdout
    finished = command("status", job_of(done)).stdout
    assert "state       succeeded" in finished
    assert f"{ROUNDS} of {ROUNDS} rounds done" in finished

    job = job_of(command("submit", recipe, "--out", cut))
    wait_for(lambda: len(checkpoints(cut)) == 2)
    # Else it might be done before it is asked and stopped.
    with slowed(head):
        # What it tells of itself comes every two seconds.
        time.sleep(3.0)
        told = command("status", job).stdout
        stopped = command("stop", job).stdout
    assert "state       running" in told
    assert f"run folder  {cut}" in told
    assert re.search(rf"progress    round \d+/{ROUNDS} (heating|cooling) rank .*, ETA ", told)
    assert f"of {ROUNDS} rounds done" in stopped
    assert f"its checkpoint is kept in {cut}\n" in stopped
    assert f"to resume: rayfed-lora resume {job} " in stopped
    assert checkpoints(cut)
    assert not (cut / "summary.json").exists()
    assert "stopped with" in command("logs", job).stdout
    assert "has ended already" in command("stop", job, status=2).stderr

    again = command("resume", job, "--follow")
    rounds = [line for line in again.stdout.splitlines() if line.startswith("round ")]
    assert 0 < len(rounds) < ROUNDS
    assert sha256(cut) == sha256(whole)
    table = command("status").stdout
    assert table.count("succeeded") == 2
    assert table.count("stopped") == 1


def test_a_plain_ray_job_tells_its_progress_too_and_is_kept_where_it_stays(
    command: Command, head: Head, recipe: Path, tmp_path: Path
) -> None:
    ray = Path(sys.executable).parent / "ray"
    words = [ray, "job", "submit", "--address", head.dashboard, "--submission-id", "plain"]
    words += ["--working-dir", recipe.parent, "--", "rayfed-lora", "run", recipe.name]
    words += ["--set", "annealing.cooling.rounds=1"]
    done = subprocess.run(words, env=head.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = command("status", "plain").stdout
    assert "recipe      small" in told
    assert "11 of 11 rounds done" in told
    (folder,) = (head.home / "rayfed-lora-runs").iterdir()
    assert f"run folder  {folder}" in told
    assert (folder / "summary.json").is_file()


# Told to stop, it needs longer than the three seconds after which Ray kills a job by default.
SLOW_SAVER = """\
import signal, sys, time

def save(number, frame):
    time.sleep(6)
    print("saved", flush=True)
    sys.exit(130)

signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""
STOPPED = """\
import sys, time
from rayfed_lora import Jobs

jobs = Jobs(sys.argv[1])
job = jobs.start("saver", "python saver.py", {"saver.py": sys.argv[2]})
while "ready" not in jobs.logs(job):
    time.sleep(0.5)
print(jobs.stop(job).state, jobs.logs(job))
"""


def test_a_stopped_job_has_time_to_save_its_run(head: Head) -> None:
    words = [sys.executable, "-c", STOPPED, head.dashboard, SLOW_SAVER]
    done = subprocess.run(words, env=head.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stopped ")
    assert "saved" in done.stdout


def test_a_job_that_fails_says_why_and_gives_its_exit_status(
    command: Command, recipe: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.parquet"
    settings = ["--set", f"data.source={gone}"]
    done = command("submit", recipe, *settings, "--out", tmp_path / "a", "--follow", status=2)
    assert f"note: data.source: {gone} is not sent along" in done.stdout
    told = command("status", job_of(done)).stdout
    assert "state       failed" in told
    assert "there is no such file" in told


def test_faulty_recipes_and_unknown_jobs_are_refused(command: Command, recipe: Path) -> None:
    wrong = ["--set", "clients.per_round=no", "seeed=1"]
    faults = command("submit", recipe, *wrong, status=2).stderr
    assert "2 faults in the recipe; nothing was started" in faults
    assert "no job 'nope' in this cluster" in command("status", "nope", status=2).stderr


def test_a_wrong_token_is_refused_with_how_to_give_the_right_one(head: Head) -> None:
    words = [sys.executable, "-c", PROGRAM, "status", "--address", head.dashboard]
    done = subprocess.run(
        words,
        env={**head.environment, "RAY_AUTH_TOKEN": "f" * 32},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN_PATH to a file with the cluster's token" in done.stderr
    assert "f" * 32 not in done.stderr


def test_a_doctor_examines_a_cluster_through_its_dashboard(
    command: Command, recipe: Path, tmp_path: Path
) -> None:
    options = ["--recipe", recipe, "--probe"]
    healthy = command("doctor", *options, "--storage", tmp_path / "new").stdout
    assert "asks for the token" in healthy
    assert "recipe small: 1 client actors of 1 CPU fit" in healthy
    assert "skipped GPU memory: no GPU in the cluster" in healthy
    assert "0 faults" in healthy
    assert not (tmp_path / "new").exists()
    # Under a file no folder can be made, not even by root.
    below = recipe / "runs"
    ill = command("doctor", *options, "--storage", below, status=1).stdout
    assert f"fault   storage {below}" in ill
    assert "fix: give every node the right to write there" in ill
