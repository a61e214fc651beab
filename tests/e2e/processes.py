"""The command line in processes that can be killed with all that they start."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

PROGRAM = "from rayfed_lora.cli.commands import main; main()"
WAIT_S = 240.0


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def command(*arguments: str) -> list[str]:
    """Return how rayfed-lora is called with these arguments."""
    return [sys.executable, "-c", PROGRAM, *arguments]


def finish(*arguments: str) -> str:
    """Call rayfed-lora, expect that it ends well without a complaint; return what it prints."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=2 * WAIT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def rounds_saved(out: Path, rounds: int) -> Callable[[], bool]:
    """Return what tells whether a checkpoint after so many rounds, or a later one, is whole."""

    def there() -> bool:
        found = out.glob("checkpoints/round-*/manifest.json")
        return any(int(path.parent.name.removeprefix("round-")) >= rounds for path in found)

    return there


@contextlib.contextmanager
def started(arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run in a process group of its own; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL the process and everything it started, Ray's own processes included."""
    family: list[psutil.Process] = []
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        # Stopped first, so that it starts no more while its children are being looked up.
        parent.suspend()
        family = [*parent.children(recursive=True), parent]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    wait_until(lambda: not any(map(lives, family)))


def lives(process: psutil.Process) -> bool:
    """Return whether a process still does anything; who inherits a dead one may not collect it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something in the run folder, as long as the run goes on."""

    def happened() -> bool:
        assert process.poll() is None, f"ended early: {process.communicate()}"
        return there()

    wait_until(happened)
