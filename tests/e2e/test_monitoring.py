"""A run's figures as Prometheus has them, and names as Ray's state API and dashboard have them."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from tests.e2e.processes import environment, kill, wait_until

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "rayfed_lora.json").read_text())
EXPRESSIONS = [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="needs the program prometheus, e.g. Debian's package of that name",
    ),
]


@dataclass(frozen=True)
class Watched:
    """Two finished runs and a Prometheus that has scraped them.

    Attributes:
        runs: folder of their run folders.
        actors: readable names of all actors while both were running.
        tasks: names of all tasks until then.
        url: of Prometheus.
        ends: time at which Prometheus knew the last round of a run, by its name.
    """

    runs: Path
    actors: list[str | None]
    tasks: list[str]
    url: str
    ends: dict[str, float] = field(default_factory=dict)

    def ask(self, query: str, run: str) -> list[dict[str, Any]]:
        """Return the series that answer a query at the end of a run, or now if it goes on."""
        text = urllib.parse.urlencode({"query": query, "time": self.ends.get(run, time.time())})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{text}", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        assert found["status"] == "success", found
        result: list[dict[str, Any]] = found["data"]["result"]
        return result

    def value(self, name: str, run: str) -> float:
        (series,) = self.ask(f'max by (run) (ray_rayfed_lora_{name}{{run="{run}"}})', run)
        return float(series["value"][1])

    def rounds(self, run: str) -> pd.DataFrame:
        return pd.read_parquet(self.runs / run / "rounds.parquet")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    # Not below pytest's folder: Ray's sockets need a short path.
    out = Path(tmp_path_factory.mktemp("m"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.monitored", str(out / "runs")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
    )
    prometheus = None
    try:
        session = Path(_told(runs)["session"])
        config = session / "metrics" / "prometheus" / "prometheus.yml"
        wait_until(config.exists)
        prometheus = psutil.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={out / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        seen = _told(runs)
        found = Watched(out / "runs", seen["actors"], seen["tasks"], f"http://127.0.0.1:{port}")
        wait_until(lambda: _scraped(found))
        yield found
    finally:
        if prometheus is not None:
            prometheus.kill()
            prometheus.wait()
        assert runs.stdin is not None
        runs.stdin.close()
        kill(runs)


def _told(runs: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what comes next of the runs; Ray writes lines of its own between."""
    assert runs.stdout is not None
    for line in runs.stdout:
        if line.startswith("{"):
            told: dict[str, Any] = json.loads(line)
            return told
    pytest.fail("the runs ended early")


def _scraped(watched: Watched) -> bool:
    """Note which runs have ended, by Prometheus; return whether all have."""
    time.sleep(1.0)
    for run in {"watched", "texts"} - set(watched.ends):
        last = f'ray_rayfed_lora_round{{run="{run}"}} == ray_rayfed_lora_rounds{{run="{run}"}} - 1'
        now = time.time()
        if watched.ask(last, run):
            watched.ends[run] = now
    return len(watched.ends) == 2


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
def test_every_query_of_the_dashboard_answers_with_a_number(watched, expression):
    query = expression.replace("$run", ".*").replace("$__rate_interval", "2m")
    assert "$" not in query
    series = [row for run in watched.ends for row in watched.ask(query, run)]
    assert {row["metric"]["run"] for row in series} & {"watched", "texts"}
    numbers = [float(row["value"][1]) for row in series]
    assert not all(map(math.isnan, numbers))


@pytest.mark.parametrize("run", ["watched", "texts"])
def test_prometheus_has_what_rounds_parquet_has(watched, run):
    rounds = watched.rounds(run)
    last = rounds.iloc[-1]
    for name in ("round", "rank", "trainable_params", "train_loss", "eval_accuracy", "eval_loss"):
        assert watched.value(name, run) == pytest.approx(last[name], rel=1e-12), name
    for name in ("bytes_up", "bytes_down", "bytes_base"):
        assert watched.value(f"{name}_total", run) == rounds[name].sum(), name
    failed, dropped = rounds["failed_clients"].sum(), rounds["dropped_clients"].sum()
    updates = rounds["clients"].sum() - failed - dropped
    assert watched.value("client_updates_total", run) == updates
    assert watched.value("client_seconds_count", run) == updates
    assert watched.value("rounds", run) == len(rounds)
    assert watched.value("round_seconds", run) == pytest.approx(last["seconds"])


def test_the_stage_of_the_newest_round_is_the_one_that_is_1(watched):
    series = watched.ask('ray_rayfed_lora_stage{run="watched"}', "watched")
    now = {row["metric"]["stage"]: float(row["value"][1]) for row in series}
    assert now == {"initiating": 0, "heating": 0, "cooling": 0, "holding": 1}


def test_lost_actors_failed_and_retried_clients_are_counted(watched):
    rounds = watched.rounds("watched")
    assert watched.value("failed_clients_total", "watched") == rounds["failed_clients"].sum() == 1
    assert watched.value("actor_restarts_total", "watched") == 1
    retried = rounds["retried_blocks"].sum()
    assert retried >= 1
    assert watched.value("retried_blocks_total", "watched") == retried
    # A block is one client here.
    assert watched.value("retried_clients_total", "watched") == retried


def test_the_idle_share_is_what_the_clients_leave(watched):
    # Six clients of half a second on two actors: 1.5 s of each 2-actor round is training.
    last = watched.rounds("watched").iloc[-1]
    busy = 6 * 0.5 / (2 * last["seconds"])
    idle = watched.value("actor_idle_share", "watched")
    assert watched.value("actors", "watched") == 2
    assert 0.0 <= idle <= 1.0
    assert idle == pytest.approx(max(0.0, 1.0 - busy), abs=0.1)


def test_actors_and_blocks_have_readable_names_in_rays_state(watched):
    names = {"client-actor-00 of watched", "client-actor-01 of watched", "server of watched"}
    assert names <= set(watched.actors)
    blocks = [name for name in watched.tasks if re.fullmatch(r"round \d+ block \d+", name)]
    assert {"round 1 block 0", "round 3 block 5"} <= set(blocks)
