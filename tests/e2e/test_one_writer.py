"""Two commands on one run folder: one writes, the other is told the owner's name."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from rayfed_lora.storage import RunFolder
from tests.e2e.processes import command, environment, finish, kill, lives, started, wait_until
from tests.e2e.test_kill_and_resume import RECIPE, ROUNDS
from tests.object_store import Bucket

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
# Eight rounds of four clients.
CLIENT_ROWS = 4 * ROUNDS
# Of one command's output on top of the 20 s that a lease lasts.
WAIT_S = 240.0
OWNER = r"owned by process \d+ on host \S+ since 20"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run that nothing happened to."""
    out = str(tmp_path_factory.mktemp("undisturbed") / "run")
    finish("run", recipe, "--out", out, "--set", "runtime.executor=local")
    return summary(RunFolder(out))


@pytest.fixture(params=["here", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "here":
        return str(tmp_path / "run")
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.uri("runs/a")


def arguments(recipe: str, out: str, executor: str, *more: str) -> list[str]:
    chosen = ["--set", f"runtime.executor={executor}"]
    return command("run", recipe, "--out", out, *chosen, *more)


def summary(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.read("summary.json"))
    return {key: found[key] for key in ("adapter_sha256", "final", "best", "communication")}


def assert_whole(out: str, undisturbed: dict[str, Any]) -> None:
    """Check that the folder holds one whole run, and no lease."""
    folder = RunFolder(out)
    counts = {"rounds.parquet": ROUNDS, "clients.parquet": CLIENT_ROWS}
    for name, rows in counts.items():
        table = pd.read_parquet(BytesIO(folder.read(name)))
        assert len(table) == rows
        assert sorted(set(table["round"])) == [*range(ROUNDS)]
    assert summary(folder) == undisturbed
    assert not [name for name in folder.names() if name.startswith(".")]


def saved(out: str, rounds: int) -> Callable[[], bool]:
    folder = RunFolder(out)

    def there() -> bool:
        names = folder.names("checkpoints")
        return any(
            name >= f"round-{rounds:06d}" and folder.exists(f"checkpoints/{name}/manifest.json")
            for name in names
            if name.startswith("round-")
        )

    return there


def call(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment(), timeout=WAIT_S
    )


@contextlib.contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[list[psutil.Process]]:
    """SIGSTOP a command and all that it has started; they may be woken by SIGCONT."""
    parent = psutil.Process(process.pid)
    parent.suspend()
    family = [*parent.children(recursive=True), parent]
    for member in family:
        member.suspend()
    yield family


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_of_two_commands_started_together_one_runs_and_the_other_is_refused(
    executor: str, recipe: str, out: str, undisturbed: dict[str, Any]
) -> None:
    words = arguments(recipe, out, executor)
    with started(words) as one, started(words) as other:
        said = [process.communicate(timeout=WAIT_S)[1] for process in (one, other)]
        statuses = [process.returncode for process in (one, other)]
    assert sorted(statuses) == [0, 2], said
    assert re.search(OWNER, said[statuses.index(2)])
    assert_whole(out, undisturbed)


@pytest.mark.ray
def test_a_second_command_beside_a_live_run_is_refused_with_and_without_resume(
    recipe: str, out: str, undisturbed: dict[str, Any]
) -> None:
    slow = ["--set", "runtime.client_actors=1"]
    with started(arguments(recipe, out, "ray", *slow)) as first:
        wait_until(saved(out, 1))
        # Held, so that it is not done before the others have looked; its driver actor renews.
        workers = [
            child
            for child in psutil.Process(first.pid).children(recursive=True)
            if re.match(r"ray::(ClientActor|client|round|evaluate)", " ".join(child.cmdline()))
        ]
        assert workers
        for worker in workers:
            worker.suspend()
        fresh = call(arguments(recipe, out, "local"))
        resumed = call(arguments(recipe, out, "local", "--resume"))
        for worker in workers:
            worker.resume()
        _, err = first.communicate(timeout=WAIT_S)
    assert (first.returncode, err) == (0, "")
    assert fresh.returncode == resumed.returncode == 2
    assert re.search(OWNER, fresh.stderr)
    assert "waiting up to 20 s" in resumed.stderr
    assert re.search(OWNER + r".*, whose run is still active", resumed.stderr)
    assert_whole(out, undisturbed)


@pytest.mark.ray
def test_after_a_kill_of_the_command_alone_a_resumed_run_waits_for_its_driver_and_is_whole(
    recipe: str, out: str, undisturbed: dict[str, Any]
) -> None:
    with started(arguments(recipe, out, "ray")) as first:
        wait_until(saved(out, 2))
        family = psutil.Process(first.pid).children(recursive=True)
        first.kill()
        first.wait()
        began = time.monotonic()
        try:
            done = call(arguments(recipe, out, "local", "--resume"))
        finally:
            for member in filter(lives, family):
                member.kill()
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 120
    assert_whole(out, undisturbed)


def test_a_stopped_command_that_wakes_after_a_takeover_writes_nothing(
    recipe: str, out: str, undisturbed: dict[str, Any]
) -> None:
    with started(arguments(recipe, out, "local")) as first:
        wait_until(saved(out, 1))
        with stopped(first) as family:
            # Its process lives: only its counter tells that it does nothing.
            done = call(arguments(recipe, out, "local", "--resume"))
            assert done.returncode == 0, done.stderr
            assert "waiting up to 20 s" in done.stderr
            for member in family:
                member.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=WAIT_S)
        assert first.returncode == 1
        assert "has lost it" in err and "nothing more is saved" in err
        assert "Traceback" not in err
    assert_whole(out, undisturbed)


def test_a_killed_command_is_replaced_at_once_and_without_a_word(
    recipe: str, out: str, undisturbed: dict[str, Any]
) -> None:
    with started(arguments(recipe, out, "local")) as first:
        wait_until(saved(out, 2))
        kill(first)
    done = call(arguments(recipe, out, "local", "--resume"))
    assert (done.returncode, done.stderr) == (0, "")
    assert_whole(out, undisturbed)
