"""What people see in a terminal of 80 columns: nothing wider, and no name, number or file cut."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from typer.main import get_command

from rayfed_lora import __version__
from rayfed_lora.cli import commands as cli
from rayfed_lora.cli import completion
from rayfed_lora.cli.cluster_display import show_jobs
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.many_runs_display import show_comparison, show_search, watching_comparison
from rayfed_lora.cli.plan_table import show_plan
from rayfed_lora.cli.run_display import show_summary, watching
from rayfed_lora.data import columns
from rayfed_lora.errors import BadInputError, DataError, RunError
from rayfed_lora.jobs.jobs import Jobs
from rayfed_lora.jobs.views import JobView
from rayfed_lora.launching import planning
from rayfed_lora.launching.launch import run as launched
from rayfed_lora.pages.comparison_tables import Cell, Comparison, Ended, Standing
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.presets import PRESETS
from rayfed_lora.runs.status import Status
from rayfed_lora.tuning.space import METRICS, load_space, shipped_spaces
from rayfed_lora.types import Proposal
from tests.fake_jobs import FakeClient
from tests.fakes import FakeFactory, make_recipe
from tests.unit.test_cli import record


class Screen(PlainConsole):
    """A terminal, of 80 columns where nothing else is said, that keeps what it shows."""

    def __init__(self, width: int = 80, terminal: bool = True) -> None:
        super().__init__(
            file=io.StringIO(), width=width, force_terminal=terminal, color_system=None
        )

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()  # type: ignore[attr-defined]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def assert_fits(screen: Screen) -> None:
    assert max(map(len, screen.lines)) <= screen.width, screen.text
    assert "…" not in screen.text


NUMBERS = {
    **{"final_accuracy": 0.91234, "best_accuracy": 0.92346},
    **{"total_bytes": 434_000_000.0, "reduction_vs_fedavg": 0.97},
    **{"reduction_vs_fedavg_with_base": 0.845, "accuracy_per_mb": 0.00212},
    **{"rounds_to_target": 12.5, "bytes_to_target": 123_000_000.0, "wall_s": 3725.0},
}


def comparison_of(*methods: str) -> Comparison:
    rows = []
    for method in methods:
        means = {f"{name}_mean": value for name, value in NUMBERS.items()}
        deviations = {f"{name}_std": value / 100 for name, value in NUMBERS.items()}
        rows.append({"method": method, "runs": 3, **means, **deviations})
    runs = pd.DataFrame({"method": list(methods), "seed": 0, "error": None})
    return Comparison(runs, pd.DataFrame(rows), pd.DataFrame(), 0.8765)


@pytest.mark.parametrize("width", [60, 80, 140, 200])
def test_a_comparison_fits_with_whole_names_and_accuracies(width: int) -> None:
    screen = Screen(width)
    names = ("sa-fedlora", "a-variant-of-my-own-with-a-long-name")
    show_comparison(screen, comparison_of(*names), "runs/b")
    assert_fits(screen)
    for part in (*names[:1], "0.9123", "0.9235"):
        assert part in screen.text
    # A name may take two lines where nothing else is left out.
    column = "".join(line.split(" ")[0] for line in screen.lines)
    assert names[1] in (column if width < 80 else screen.text)
    assert "report: runs/b/report.html" in screen.text
    # All columns where there is room, else a line that names those left out.
    assert ("not shown at" in screen.text) == (width < 200)


def search_of(trials: int) -> SimpleNamespace:
    names = [f"a1b2c_{i:05d}" for i in range(trials)]
    columns = {"trial": names, "status": "finished", "error": None, "on_front": True}
    measured = {"eval_accuracy": 0.91234, "total_bytes": 28_912_345}
    drawn = {"annealing.heating.rank": 16, "annealing.cooling.shape": "exponential"}
    table = pd.DataFrame({**columns, **measured, **drawn})
    best = {"eval_accuracy": names[0], "total_bytes": names[1], "knee": names[1]}
    return SimpleNamespace(location="runs/my search", trials=table, best=best)


def test_a_search_fits_with_whole_trials_accuracies_and_files_and_runs_its_best() -> None:
    screen, keys = Screen(), ["annealing.heating.rank", "annealing.cooling.shape"]
    show_search(screen, search_of(3), keys)  # type: ignore[arg-type]
    assert_fits(screen)
    for part in ("a1b2c_00000", "0.9123", "28.91 MB", "best-eval_accuracy.yaml", "test accuracy"):
        assert part in screen.text
    assert screen.lines[-1] == "best: rayfed-lora run 'runs/my search/best.yaml'"
    wide = Screen(140)
    show_search(wide, search_of(3), keys)  # type: ignore[arg-type]
    assert "heating rank" in " ".join(wide.text.split()) and "exponential" in wide.text


def test_jobs_fit_with_whole_ids_and_progress() -> None:
    screen, job = Screen(), f"{'r' * 40}-20260101-120000-abc123"
    progress = SimpleNamespace(
        line=lambda ended: "round 112/120 initiating full model, ETA 1:00:12"
    )
    view = JobView(job, "r" * 40, "succeeded", "/out", progress, 1.0)  # type: ignore[arg-type]
    show_jobs(screen, [view], "http://127.0.0.1:8265")
    assert_fits(screen)
    # An id may take two lines, folded and not cut.
    shown = "".join(line.split()[0] for line in screen.lines[2:-1] if line.split())
    assert shown.startswith(job[:30]) and "succeeded" in screen.text
    words = " ".join(screen.text.split())
    assert all(word in words for word in ("112/120", "initiating", "1:00:12"))


def test_a_plan_fits_and_counts_rounds_from_1() -> None:
    screen, recipe = Screen(), load_recipe("digits-vit")
    show_plan(screen, recipe, planning.plan(recipe))
    assert_fits(screen)
    rows = [line.split() for line in screen.lines if re.match(r"\d+ +\w+ing ", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 31))
    assert rows[0][1:3] == ["initiating", "full"] and rows[-1][1:3] == ["holding", "4"]


CHANGED = {"proposal": Proposal(2, "reheated"), "failed_clients": 1}
ROUND = record(round=111, stage="initiating", rank=None, clients=10, **CHANGED)


@pytest.mark.parametrize("width", [80, 100, 180])
def test_a_round_fits_and_names_its_losses_apart(width: int) -> None:
    screen = Screen(width)
    with watching(screen, "runs/a b") as watch:
        watch(Status(step="starting Ray", rounds=120))
        watch(Status(phase="training", rounds=120, records=(ROUND,)))
    kept = [line.rstrip() for line in screen.text.replace("\r", "\n").split("\n")]
    (line,) = [each for each in kept if each.lstrip("\x1b[2K").startswith("round 112/120  init")]
    assert len(line.lstrip("\x1b[2K")) <= width
    assert "full" in line and "train loss 1.250" in line and "test accuracy 0.500" in line
    assert ("test loss 1.000" in line) == (width >= 100)
    remarks = "reheated  1 failed"
    assert (remarks in line) == (width == 180) and remarks in screen.text


def test_the_run_folder_comes_first_and_each_step_of_the_start_is_told_once() -> None:
    screen = Screen(terminal=False)
    with watching(screen, "runs/a") as watch:
        for step in ("starting Ray", "loading data and model", "loading data and model"):
            watch(Status(step=step, rounds=3))
        watch(Status(phase="training", rounds=3, records=(record(),)))
    first, *steps = screen.lines
    assert first == "run folder: runs/a"
    assert [step.split(" ", 1)[1] for step in steps if step[0] == "0"] == [
        *("starting Ray", "loading data and model", "training")
    ]


def test_a_live_line_fits_80_columns_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 4000.0)
    screen = Screen()
    busy: dict[str, Any] = {"running": 112, "stage": "initiating", "rank": None, "clients": 1000}
    numbers = {"loss": 1.25, "accuracy": 0.5, "bytes_total": 10**9, "updates": 999}
    with watching(screen, "runs/a") as watch:
        watch(
            Status(
                "training", "", 111, 120, clients_done=999, training_since=1.0, **busy, **numbers
            )
        )
    shown = screen.text.replace("\r", "\n").split("\n")
    (line,) = {each.lstrip("\x1b[2K").strip() for each in shown if "round 112/120" in each}
    assert len(line) <= 80
    # 3999 s took 111.999 rounds, 8.001 are left: 285.7 s.
    assert line.startswith("round 112/120 initiating full model") and line.endswith("ETA 4:46")


def test_a_comparison_says_how_long_it_will_take() -> None:
    cell = Cell("fedavg", 0, make_recipe(), "out/fedavg/seed-0")
    quarter = Status(phase="training", rounds=4, running=2, clients=1, training_since=100.0)
    # A round took 30 s, so three more take 90, and each of two more runs 120.
    assert Standing(3, cell, quarter).eta_s(130.0) == pytest.approx(90 + 2 * 120)
    ended = (Ended(cell, 0.5, 200.0), Ended(cell, None, 1.0, "failed"))
    assert Standing(4, cell, quarter, ended).eta_s(130.0) == pytest.approx(90 + 200)
    assert Standing(3, cell, Status(rounds=4), ended[:1]).eta_s(130.0) == pytest.approx(2 * 200)
    assert Standing(3, cell, Status(rounds=4)).eta_s(130.0) is None
    screen = Screen(140)
    with watching_comparison(screen, "out") as watch:
        watch(Standing(3, cell, quarter))
    assert screen.lines[0].endswith("comparison: out")


def test_a_finished_run_says_what_there_is_and_how_to_export_it(tmp_path: Any) -> None:
    place = str(tmp_path / "a b")
    result = launched(make_recipe(), place, factory=FakeFactory())
    screen = Screen(200)
    show_summary(screen, result.summary, place)
    assert screen.lines[-4:] == [
        f"run folder: {place}",
        f"report: {place}/report.html",
        f"adapter: {place}/adapter",
        f"export: rayfed-lora export '{place}' --to '{place}-model'",
    ]
    narrow = Screen()
    show_summary(narrow, result.summary, "runs/a")
    assert_fits(narrow)
    assert any(line.startswith("best test accuracy, round 1 ") for line in narrow.lines), (
        narrow.text
    )
    heading = next(line for line in narrow.lines if line.startswith("model "))
    assert "test loss" in heading and "train loss" in heading


def test_the_choices_in_the_help_are_those_that_there_are() -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    texts = {
        (name, each.name): str(getattr(each, "help", ""))
        for name, command in commands.items()
        for each in command.params
    }

    def listed(text: str) -> set[str]:
        return set(text.rpartition(":")[2].rstrip(".").replace(" ", "").split(","))

    assert listed(texts["compare", "methods"]) == set(PRESETS)
    assert listed(texts["tune", "objectives"]) == set(METRICS)
    assert listed(texts["tune", "space"]) == set(shipped_spaces())
    for name, command in commands.items():
        assert f"rayfed-lora {name}" in command.epilog, name


def test_a_failed_run_says_how_to_go_on_with_the_address_that_was_given(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(recipe: Any, out: str, **options: Any) -> None:
        launched(make_recipe(), out, factory=FakeFactory())
        raise RunError("the server was lost")

    monkeypatch.setattr("rayfed_lora.launching.launch.run", fail)
    place = tmp_path / "a b"
    words = ["rayfed-lora", "run", "digits-vit", "--out", str(place), "--address", "ray:1"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "rayfed-lora: the server was lost",
        f"to resume: rayfed-lora run '{place}' --resume --address ray:1",
    ]


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[Any, str, str]:
    monkeypatch.setattr("sys.argv", ["rayfed-lora", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, *capsys.readouterr()


def test_version_and_short_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(monkeypatch, capsys, "--version") == (0, f"rayfed-lora {__version__}\n", "")
    for command in ((), ("run",), ("status",)):
        code, out, _ = said(monkeypatch, capsys, *command, "-h")
        assert code == 0 and "Examples:" in out and max(map(len, out.splitlines())) <= 80


def test_completion_knows_recipes_methods_spaces_and_paths(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-mine.yaml").touch()
    assert completion.complete_recipes("digits-") == ["digits-vit", "digits-mine.yaml"]
    assert completion.complete_methods("fedavg,fedp") == ["fedavg,fedprox"]
    assert completion.complete_spaces("qu") == ["quick"]


def test_a_misspelt_space_job_or_column_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInputError, match=r"\(did you mean 'heating_cooling'\?\)"):
        load_space("heating_colling")
    client = FakeClient()
    job = Jobs(client=client).submit(make_recipe(), "/out").id
    for ask in ("status", "stop", "resume"):
        with pytest.raises(BadInputError, match=f"did you mean '{job}'"):
            getattr(Jobs(client=client), ask)(job[:-1])
    table = pa.table({"question": ["a"], "topic": ["b"]})
    with pytest.raises(DataError, match=r"name it in `data.label_column`.*\(did you mean 'topic'"):
        columns.pick(table, ("topics",), "label_column", "q.csv")


def test_texts_are_never_markup_nor_lines_of_their_own() -> None:
    screen = Screen()
    screen.print_facts({"run folder": "runs/a[/b]c\nround 1/1"})
    screen.print_rows([{"name": "[/x]\n[bold]y", "n": "1"}])
    assert screen.lines[0] == "run folder: runs/a[/b]c\\nround 1/1"
    assert screen.lines[-1].split() == ["[/x]\\n[bold]y", "1"]
