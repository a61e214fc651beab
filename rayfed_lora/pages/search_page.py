"""The page of a search: trials, Pareto front, drawn values, objectives. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import child
from rayfed_lora.pages.curves import measure, short
from rayfed_lora.pages.figures import LOG_BYTES, Figure, curve_figures, framed
from rayfed_lora.pages.page import even, page, shown
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs import seals
from rayfed_lora.runs.checked import table
from rayfed_lora.runs.reading import rounds_so_far
from rayfed_lora.storage import RunFolder
from rayfed_lora.units import megabytes

TRIALS_FILE = "trials.parquet"
SEARCH_FILE = "search.yaml"
# More curves are not distinguishable.
_MOST_CURVES = 24


@dataclass(frozen=True)
class SearchNews:
    """An update on a search for its observers.

    Attributes:
        trials: number of all trials, 0 before the first starts.
        running: finished rounds of each running trial.
        ended: id and outcome of a trial that has just ended.
        warning: a line for the user.
        done: number of ended trials.
        rounds: of a trial that is not stopped early.
        drawn: values of the trial that has just ended, by recipe key.
        location: the search's folder, in the first news.
    """

    trials: int = 0
    running: Mapping[str, int] = field(default_factory=dict)
    ended: tuple[str, str] | None = None
    warning: str | None = None
    done: int = 0
    rounds: int = 0
    drawn: Mapping[str, Any] = field(default_factory=dict)
    location: str | None = None

    @property
    def trials_done(self) -> float:
        """Ended trials, and the finished share of the running ones."""
        begun = sum(min(done / max(self.rounds, 1), 1.0) for done in self.running.values())
        return self.done + begun


Watch = Callable[[SearchNews], None]


@dataclass(frozen=True)
class SearchData:
    """A search as its report shows it.

    Attributes:
        name: of the recipe.
        objectives: max or min by metric.
        drawn: recipe keys with drawn values.
        trials: rows of trials.parquet.
        rounds: rows of rounds.parquet of the best trials, with the trial as `method`.
    """

    name: str
    objectives: Mapping[str, str]
    drawn: tuple[str, ...]
    trials: pd.DataFrame
    rounds: pd.DataFrame


def read_search(folder: RunFolder) -> SearchData:
    """Read a search's folder; raises RunFolderError where something is missing or damaged."""
    try:
        search = parse_yaml(folder.location, seals.text(folder, SEARCH_FILE))
        trials = table(folder, TRIALS_FILE).to_pandas()
        space, recipe = search["space"], search["recipe"]
        objectives = dict(space["objectives"])
        first, mode = next(iter(objectives.items()))
        ran = trials[trials["round"].notna()].sort_values(first, ascending=mode == "min")
        rounds: list[pd.DataFrame] = []
        for trial, status in zip(ran["trial"], ran["status"], strict=True):
            if len(rounds) == _MOST_CURVES:
                break
            try:
                # A confined folder rejects links that lead out of it. A trial that failed early
                # may have saved nothing.
                if folder.exists(f"trials/{trial}/rounds.parquet"):
                    # Not the recorded location: the folder may have been moved.
                    own = rounds_so_far(RunFolder(child(folder.location, "trials", trial)))
                    rounds.append(own.assign(method=trial, seed=recipe["seed"]))
            except RunFolderError:
                # The table of trials gives the reason of a failure.
                if status != "failed":
                    raise
        drawn = tuple({**space["parameters"], **space["rounds"]})
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(f"{folder.location} cannot be read: {error}") from error
    curves = pd.concat(rounds, ignore_index=True)
    return SearchData(recipe["name"], objectives, drawn, trials, curves)


def search_html(search: SearchData) -> str:
    """Return the page of a search."""
    counts = search.trials["status"].value_counts().to_dict()
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    failed = search.trials[search.trials["error"].notna()]
    return page(
        f"search over {search.name}",
        f"{len(search.trials)} trials: {said}",
        even([_row(search, row) for row in search.trials.to_dict("records")]),
        _figures(search),
        failures=failed[["trial", "error"]].astype(str).to_dict("records"),
    )


def _row(search: SearchData, row: Mapping[Any, Any]) -> dict[str, str]:
    facts = {"trial": str(row["trial"]), "status": str(row["status"])}
    if len(search.objectives) > 1:
        facts["front"] = "yes" if row["on_front"] else ""
    for name in search.objectives:
        value = row[name]
        sent = "bytes" in name and pd.notna(value)
        facts[short(name)] = megabytes(value) if sent else shown(value)
    return {**facts, **{short(key): shown(row[key]) for key in search.drawn}}


def _figures(search: SearchData) -> Iterator[tuple[str, Figure]]:
    done = search.trials[search.trials["status"] == "finished"]
    names = list(search.objectives)
    if len(names) > 1:
        yield "Pareto front", _front(done, names[0], names[1])
    yield "Drawn values and objectives", _parallel(search, done)
    yield from curve_figures(search.rounds, stages=False)


def _front(done: pd.DataFrame, upper: str, across: str) -> Figure:
    done = done.sort_values(across)
    (x_label, x), (y_label, y) = (measure(name, done[name]) for name in (across, upper))
    front, traces = done["on_front"], []
    for label, own, mode, opacity in (
        ("dominated", ~front, "markers", 0.4),
        ("front", front, "lines+markers", 1.0),
    ):
        points = {"x": x[own].tolist(), "y": y[own].tolist(), "text": done["trial"][own].tolist()}
        style = {"marker": {"size": 8, "opacity": opacity}, "line": {"shape": "hv", "width": 1}}
        traces.append({**points, "name": label, "mode": mode, **style})
    log = LOG_BYTES if "bytes" in across else {}
    x_axis, y_axis = {"title": {"text": x_label}, **log}, {"title": {"text": y_label}}
    return framed(traces, 400, x_axis, y_axis, showlegend=True)


def _parallel(search: SearchData, done: pd.DataFrame) -> Figure:
    """Return parallel coordinates: one axis per key and objective, one line per finished trial."""
    keys = [key for key in search.drawn if done[key].nunique(dropna=False) > 1]
    axes = [_axis(*measure(name, done[name])) for name in (*keys, *search.objectives)]
    first = done[next(iter(search.objectives))]
    colour = {"color": first.tolist(), "colorscale": "Viridis", "showscale": True}
    trace = {"type": "parcoords", "dimensions": axes, "line": colour, "labelangle": -25}
    margin = {"l": 70, "r": 40, "t": 110, "b": 30}
    return framed([trace], 460, {}, {}, margin=margin, meta="wide")


def _axis(label: str, values: pd.Series[Any]) -> dict[str, Any]:
    if pd.api.types.is_numeric_dtype(values) and values.notna().all():
        return {"label": label, "values": values.tolist()}
    names = values.map(shown)
    known = sorted(names.unique())
    ticks = {"tickvals": list(range(len(known))), "ticktext": known}
    places = [known.index(name) for name in names]
    return {"label": label, "values": places, **ticks, "range": [0, max(len(known) - 1, 1)]}
