"""The shipped Grafana dashboard: a layout that Grafana shows, queries of metrics that exist."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.launching import ray_metrics

PATH = Path(__file__).parents[2] / "cluster" / "grafana" / "rayfed_lora.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
DECLARED = {
    *ray_metrics._GAUGES,
    *(f"{name}_total" for name in ray_metrics._COUNTERS),
    "stage",
    "client_seconds_bucket",
}


def test_the_dashboard_has_variables_for_the_data_source_and_for_runs():
    source, run = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert (run["name"], run["type"], run["multi"], run["includeAll"]) == (
        "run",
        "query",
        True,
        True,
    )
    assert run["query"]["query"] == "label_values(ray_rayfed_lora_round, run)"


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)
    assert all(place["x"] + place["w"] <= 24 for place in places)


@pytest.mark.parametrize(
    "panel", [p for p in PANELS if p["type"] != "row"], ids=lambda panel: panel["title"]
)
def test_a_panel_asks_the_chosen_source_for_the_chosen_runs(panel):
    for target in (panel, *panel["targets"]):
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        asked = re.findall(r"ray_rayfed_lora_(\w+)(\{[^}]*\})", target["expr"])
        assert target["expr"].count("ray_rayfed_lora_") == len(asked) > 0
        assert {name for name, _ in asked} <= DECLARED
        assert {selector for _, selector in asked} == {'{run=~"$run"}'}
        # A round loop that is started again has series of its own.
        assert "by (run" in target["expr"]


def test_every_metric_is_in_some_panel():
    text = PATH.read_text()
    unseen = {name for name in DECLARED if f"ray_rayfed_lora_{name}{{" not in text}
    assert unseen == {"clients", "client_updates_total"}
