"""A search that is killed with all its processes, or stopped, ends as one that was left alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pandas as pd
import pytest

from tests.e2e.processes import WAIT_S, command, finish, started, wait_for
from tests.e2e.test_kill_and_resume import RECIPE

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(900)]

SPACE = """\
parameters:
  annealing.heating.rank: {choice: [2, 4]}
  annealing.cooling.rank: {choice: [0.5, 1.0], of: annealing.heating.rank}
objectives: {eval_loss: min, total_bytes: min}
scheduler: none
search: grid
"""


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "space.yaml").write_text(SPACE)
    files = [str(folder / "space.yaml"), "--recipe", str(folder / "recipe.yaml")]
    return ["tune", *files, "--out", str(out), *more]


def shas(out: Path) -> dict[tuple[int, int], str]:
    """Return the result of each trial by its ranks."""
    trials = pd.read_parquet(out / "trials.parquet")
    assert set(trials["status"]) == {"finished"}
    return {
        (row["annealing.heating.rank"], row["annealing.cooling.rank"]): json.loads(
            (out / "trials" / row["trial"] / "summary.json").read_text()
        )["adapter_sha256"]
        for row in trials.to_dict("records")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    said = finish(*arguments(folder, folder / "out"))
    assert "4 finished" in said and "best-knee.yaml" in said
    return shas(folder / "out")


def test_a_search_that_is_killed_goes_on_without_redoing_finished_trials(undisturbed, tmp_path):
    out = tmp_path / "out"

    def done() -> list[Path]:
        return list(out.glob("trials/*/summary.json"))

    with started(command(*arguments(tmp_path, out, "--max-concurrent", "1"))) as process:
        wait_for(lambda: len(done()) > 0, process)
        wait_for(lambda: len(list(out.glob("trials/*/rounds.parquet"))) > len(done()), process)
    finished = {path: path.stat().st_mtime_ns for path in done()}
    assert 0 < len(finished) < 4
    finish(*arguments(tmp_path, out, "--resume", "--max-concurrent", "1"))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert shas(out) == undisturbed


def test_a_search_that_is_interrupted_says_how_to_go_on(undisturbed, tmp_path):
    out = tmp_path / "out"
    with started(command(*arguments(tmp_path, out))) as process:
        wait_for(lambda: len(list(out.glob("trials/*/rounds.parquet"))) > 0, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "--resume" in said and "Traceback" not in said
    finish(*arguments(tmp_path, out, "--resume"))
    assert shas(out) == undisturbed
