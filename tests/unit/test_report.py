"""Reports: what the page shows is what the folders hold."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import rayfed_lora
from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.errors import BadInputError, RunFolderError
from rayfed_lora.launching.compare import compare
from rayfed_lora.pages.curves import curves
from rayfed_lora.pages.figures import figures, partitions
from rayfed_lora.pages.report import report, report_html
from rayfed_lora.runs.labelled_runs import read_runs
from rayfed_lora.runs.reading import RunData, read_run
from rayfed_lora.storage import RunFolder
from tests.fakes import RECIPE, Behaviour, FakeFactory, every_round, make_recipe


def finished(location: Path, behaviour: Behaviour | None = None, **overrides: object) -> RunData:
    recipe = make_recipe(**overrides)
    rayfed_lora.run(recipe, str(location), factory=FakeFactory(behaviour or Behaviour()))
    return read_run(RunFolder(location))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """A run of a Metropolis schedule with tests on clients and a client that always fails."""
    return finished(
        tmp_path_factory.mktemp("runs") / "one",
        Behaviour(failing=every_round(2)),
        annealing__acceptance="metropolis",
        evaluation__client_fraction=0.5,
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    compare(RECIPE, ["sa-fedlora", "fedavg"], str(out), (0, 1), factory=FakeFactory())
    return out


def test_a_page_needs_nothing_from_elsewhere_and_names_the_run(one):
    page = report_html([one])
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=""", page)
    assert "Plotly.newPlot" in page
    for shown in ("<h1>fake</h1>", "sa-fedlora", "acceptance: metropolis", one.location):
        assert shown in page


def test_curves_have_the_values_of_the_tables(one):
    drawn = dict(figures([one]))
    rounds = one.rounds
    (trace,) = drawn["Accuracy on the test split"]["data"]
    assert trace["x"] == [1, 2, 3, 4, 5, 6]
    assert trace["y"] == rounds["eval_accuracy"].tolist()
    (trace,) = drawn["Accuracy against traffic"]["data"]
    sent = (rounds["bytes_up"] + rounds["bytes_down"]).cumsum() / 1e6
    assert trace["x"] == sent.tolist()
    (trace,) = drawn["Temperature"]["data"]
    cooling = rounds[rounds["temperature"].notna()]
    assert trace["x"] == (cooling["round"] + 1).tolist()
    assert trace["y"] == cooling["temperature"].tolist()
    assert "Perplexity on the test split" not in drawn


def test_stages_are_shaded_behind_the_curve_of_a_single_run(one):
    # 1 initiating, 2 heating, 2 cooling and 1 holding round.
    layout = dict(figures([one]))["Rank"]["layout"]
    assert [note["text"] for note in layout["annotations"]] == [
        "initiating",
        "heating",
        "cooling",
        "holding",
    ]
    edges = [(shape["x0"], shape["x1"]) for shape in layout["shapes"]]
    assert edges == [(0.5, 1.5), (1.5, 3.5), (3.5, 5.5), (5.5, 6.5)]


def test_every_proposal_is_in_the_record_with_its_verdict(one):
    page = report_html([one])
    verdicts = one.rounds["verdict"].dropna().tolist()
    assert verdicts
    table = page[page.index("Annealing record") : page.index("The worst 10 %")]
    assert re.findall(r"accepted|rejected", table) == verdicts


def test_failures_are_named_and_counted(one):
    cohorts = one.rounds["failed_clients"].sum()
    assert one.failed == cohorts > 0
    assert set(one.failures["client"]) == {2}
    page = report_html([one])
    assert page.count(one.failures["error"].iloc[0]) == one.failed


def test_an_error_or_a_label_that_looks_like_a_page_is_shown_as_text(one):
    failures = one.failures.assign(error="<script>alert(1)</script>")
    partition = one.partition.assign(label="</script><script>alert(2)</script>")
    changed = replace(
        one, label="</script><script>alert(3)", failures=failures, partition=partition
    )
    page = report_html([changed, one])
    assert not re.search(r"<script>alert\(\d\)", page)
    assert "&lt;script&gt;alert(1)" in page


def test_the_picture_of_the_partition_counts_every_example(one):
    ((label, figure),) = partitions([one])
    assert label == "one, seed 3"
    (heat,) = figure["data"]
    # Client k of the fakes holds k + 1 examples, all of one label.
    assert heat["x"] == ["0", "1", "2", "3", "4", "5"]
    np.testing.assert_array_equal(np.sum(heat["z"], axis=0), [1, 2, 3, 4, 5, 6])


def test_many_clients_are_stood_for_by_some_of_them():
    # Clients 0 to 4 hold rows 0-1, 2-3, ...; at most 3 are shown: every second one.
    table = ClientTable(np.arange(10), np.arange(0, 11, 2))
    labels = np.array([0, 1, 1, 1, 2, 2, 0, 0, 1, 2])
    clients, counts = table.label_counts(labels, classes=3, most=3)
    assert clients.tolist() == [0, 2, 4]
    assert counts.tolist() == [[1, 1, 0], [0, 0, 2], [0, 1, 1]]


def test_the_worst_tenth_of_clients_is_listed_and_the_spread_told(one):
    page = report_html([one])
    spread = one.summary["clients"]
    assert f"{spread['accuracy_mean']:.4g}" in page[page.index("Spread over clients") :]
    worst = one.tests.nsmallest(1, "accuracy").iloc[0]
    listed = page[page.index("The worst 10 %") : page.index("Recipe")]
    assert f"<td>{int(worst['client'])}</td>" in listed


def test_seeds_of_a_method_are_one_curve_with_their_mean():
    rounds = pd.DataFrame(
        {
            "method": ["a", "a", "b", "a", "a"],
            "seed": [0, 0, 0, 1, 1],
            "round": [0, 1, 0, 0, 1],
            "bytes_so_far": [1e6, 2e6, 5e6, 3e6, 4e6],
            "eval_accuracy": [0.2, 0.6, 0.9, 0.4, None],
        }
    )
    a, b = curves(rounds, "eval_accuracy", "bytes_so_far")
    assert (a.label, a.place, a.runs, b.label, b.place, b.runs) == ("a", 0, 2, "b", 1, 1)
    # Round 1: (0.2 + 0.4) / 2, deviation sqrt(0.01 + 0.01); round 2: seed 1 was not tested.
    np.testing.assert_allclose(a.mean, [0.3, 0.6])
    np.testing.assert_allclose(a.std, [np.sqrt(0.02), 0.0])
    np.testing.assert_allclose(a.x, [2.0, 2.0])
    np.testing.assert_allclose(b.std, [0.0])


def test_a_comparison_is_reported_by_method_even_after_it_was_moved(several, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(several, moved)
    runs = read_runs([str(moved)])
    assert [(run.label, run.seed) for run in runs] == [
        ("sa-fedlora", 0),
        ("fedavg", 0),
        ("sa-fedlora", 1),
        ("fedavg", 1),
    ]
    assert all(run.location.startswith(str(moved)) for run in runs)
    names = [trace.get("name") for trace in dict(figures(runs))["Training loss"]["data"]]
    assert names == [None, "sa-fedlora (2 seeds)", None, "fedavg (2 seeds)"]


def test_a_comparison_leaves_plots_for_papers_and_a_report(several):
    files = {path.name for path in (several / "plots").iterdir()}
    for plot in ("accuracy-by-round", "accuracy-by-bytes", "loss-by-round", "rank"):
        assert {f"{plot}.pdf", f"{plot}.png"} <= files
    assert (several / "plots/rank.png").read_bytes().startswith(b"\x89PNG")
    assert (several / "plots/rank.pdf").read_bytes().startswith(b"%PDF")
    assert "4 runs" in (several / "report.html").read_text()


def test_runs_of_one_name_and_seed_are_told_apart(one, tmp_path):
    other = tmp_path / "elsewhere" / "one"
    shutil.copytree(one.location, other)
    first, second = (run.label for run in read_runs([one.location, str(other)]))
    assert first != second
    assert second.endswith("elsewhere/one")


def test_an_unfinished_run_is_shown_as_far_as_it_went(one, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(one.location, folder)
    (folder / "summary.json").unlink()
    (folder / "SHA256SUMS").unlink()
    to = report([str(folder)])
    assert to == f"{folder}/report.html"
    assert "not finished" in Path(to).read_text()


def test_what_cannot_be_reported_is_refused(one, tmp_path):
    with pytest.raises(BadInputError, match="at least one run folder"):
        report([])
    with pytest.raises(BadInputError, match=r"ends in \.html, got 'x\.pdf'"):
        report([one.location], "x.pdf")
    with pytest.raises(RunFolderError, match=r"expected the folder of a run \(recipe\.yaml\)"):
        report([str(tmp_path)])
    (tmp_path / "recipe.yaml").write_text((Path(one.location) / "recipe.yaml").read_text())
    with pytest.raises(RunFolderError, match="a run with a finished round"):
        report([str(tmp_path)])
    shutil.copytree(one.location, tmp_path / "spoilt")
    (tmp_path / "spoilt/clients.parquet").write_bytes(b"nothing")
    with pytest.raises(RunFolderError, match=r"spoilt/clients\.parquet is damaged"):
        report([str(tmp_path / "spoilt")])


def test_runs_of_other_recipes_are_never_drawn_as_seeds_of_one(one, several, tmp_path):
    finished(tmp_path / "x/out", seed=0)
    finished(tmp_path / "y/out", seed=1)
    same = read_runs([str(tmp_path / "x/out"), str(tmp_path / "y/out")])
    assert [run.label for run in same] == ["out", "out"]
    finished(tmp_path / "z/out", seed=2, method="fedlora")
    other = read_runs([str(tmp_path / "x/out"), str(tmp_path / "z/out")])
    assert [run.label[-5:] for run in other] == ["x/out", "z/out"]
    shutil.copytree(several, tmp_path / "second")
    twice = read_runs([str(several), str(tmp_path / "second")])
    assert len({run.label for run in twice}) == 4
    assert all(label.count("/") == 1 for label in {run.label for run in twice})
    for name in ("trec", "vader"):
        shutil.copytree(several, tmp_path / name / "same")
    alike = read_runs([str(tmp_path / "trec/same"), str(tmp_path / "vader/same")])
    groups = {(run.label, run.location.split("/same")[0]) for run in alike}
    assert len({run.label for run in alike}) == len(groups) == 4
    assert all(label.startswith(("trec/same/", "vader/same/")) for label, _ in groups)


def test_a_table_has_the_columns_of_all_its_rows(one, tmp_path):
    unfinished = replace(one, label="first", summary=None)
    page = report_html([unfinished, one])
    table = page[page.index("<table>") : page.index("</table>")]
    assert "<th>best test accuracy</th>" in table
    assert "<th>perplexity</th>" not in table
