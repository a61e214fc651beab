"""A comparison on Ray: one crew of actors for all of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.launching.compare import compare
from rayfed_lora.pages.comparison_tables import Comparison
from tests.fakes import RECIPE, Behaviour, FakeFactory

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

METHODS = ["sa-fedlora", "flora", "fedsa-lora"]
ON_RAY = {"runtime.executor": "ray", "runtime.client_actors": 2, "runtime.cohort_size": 1}


def compared(out: Path, settings: dict[str, Any], factory: FakeFactory) -> Comparison:
    return compare(RECIPE, METHODS, str(out), (0, 1), settings=settings, factory=factory)


def client_actors() -> set[str]:
    from ray._private.state import actors

    found = actors().values()
    return {a["ActorID"] for a in found if a["ActorClassName"] == "ClientActor"}


def test_all_runs_share_the_actors_and_give_what_each_gives_in_one_process(tmp_path):
    before = client_actors()
    on_ray = compared(tmp_path / "ray", ON_RAY, FakeFactory())
    assert len(client_actors() - before) == 2
    here = compared(tmp_path / "local", {"runtime.cohort_size": 1}, FakeFactory())
    same = ["method", "seed", "final_loss", "total_bytes", "bytes_base", "adapter_sha256"]
    assert on_ray.runs[same].equals(here.runs[same])
    assert on_ray.runs["error"].isna().all()


@pytest.mark.e2e
def test_an_actor_that_dies_takes_no_run_with_it(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    dying = Behaviour(dying=frozenset((client, 4) for client in range(6)), marker=str(marker))
    on_ray = compared(tmp_path / "ray", ON_RAY, FakeFactory(dying))
    assert not marker.exists()
    here = compared(tmp_path / "local", {"runtime.cohort_size": 1}, FakeFactory())
    assert on_ray.runs["adapter_sha256"].tolist() == here.runs["adapter_sha256"].tolist()


def test_a_run_whose_client_raises_is_noted_and_the_next_one_goes_on(tmp_path):
    raising = Behaviour(raising=frozenset({(client, 5) for client in range(6)}))
    first = compare(
        RECIPE,
        ["fedlora"],
        str(tmp_path),
        (0,),
        settings=ON_RAY,
        factory=FakeFactory(),
    )
    both = compare(
        RECIPE, ["fedlora", "rolora"], str(tmp_path), settings=ON_RAY, factory=FakeFactory(raising)
    )
    errors = both.runs.set_index("method")["error"]
    assert "was told to raise" in errors["rolora"]
    assert both.runs["adapter_sha256"].tolist()[0] == first.runs["adapter_sha256"].tolist()[0]
