"""Two runs on a Ray head of their own, which stays until the standard input is closed.

`python -m tests.e2e.monitored OUT` writes the runs into OUT and prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.state import list_actors, list_tasks

from rayfed_lora.launching.simulation_server import SimulationServer
from rayfed_lora.recipe.recipe import Recipe
from tests.fakes import Behaviour, FakeFactory, make_recipe

# Long enough to be scraped in its middle: 24 rounds of 6 clients on two actors, or 3 on one.
SLEEP_S = 0.5
LENGTH = {"annealing.cooling.rounds": 12, "annealing.holding.rounds": 9}
CLASSES: dict[str, Any] = {
    **LENGTH,
    "name": "watched",
    "annealing.acceptance": "metropolis",
    "clients.per_round": 6,
    "clients.speed": 10.0,
    "runtime.client_actors": 2,
}
TEXTS: dict[str, Any] = {
    **LENGTH,
    "name": "texts",
    # Has scores on the validation split.
    "annealing.acceptance": "target",
    "runtime.client_actors": 1,
}


def on_ray(settings: dict[str, Any]) -> Recipe:
    chosen = {"runtime.executor": "ray", "runtime.cohort_size": 1, **settings}
    return make_recipe(**{key.replace(".", "__"): value for key, value in chosen.items()})


def server_of(recipe: Recipe, out: Path, behaviour: Behaviour) -> Any:
    options = {"name": f"rayfed-lora {out}", "num_cpus": 0, "max_concurrency": 2}
    remote = ray.remote(SimulationServer).options(**options)
    return remote.remote(recipe, str(out), factory=FakeFactory(behaviour))


def main(out: Path) -> None:
    out.mkdir()
    marker = out / "marker"
    marker.touch()
    slow = Behaviour(sleep_s=dict.fromkeys(range(6), SLEEP_S))
    faulty = replace(
        slow,
        dying=frozenset({(3, 8)}),
        marker=str(marker),
        failing=frozenset({(2, 5)}),
        tests="probabilities",
    )
    context = ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=True,
        dashboard_port=0,
        namespace="rayfed_lora",
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(out.parent / "ray"),
    )
    runs = [
        server_of(on_ray(CLASSES), out / "watched", faulty),
        server_of(on_ray(TEXTS), out / "texts", replace(slow, tests="texts")),
    ]
    print(json.dumps({"session": ray._private.worker._global_node.get_session_dir_path()}))
    sys.stdout.flush()
    pending = [run.run.remote() for run in runs]
    # Ray tells of tasks a second or more after they have ended.
    while ray.get(runs[0].status.remote()).rounds_done < 6:
        time.sleep(0.2)
    head = f"http://{context.dashboard_url}"
    seen = {
        "actors": [actor.repr_name for actor in list_actors(head, detail=True, limit=1000)],
        "tasks": [task.name for task in list_tasks(head, limit=10_000)],
    }
    print(json.dumps(seen))
    sys.stdout.flush()
    ray.get(pending)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
