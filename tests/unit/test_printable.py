"""What others have written neither commands a terminal nor computes in a spreadsheet."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from rayfed_lora.cli import commands as cli
from rayfed_lora.cli.cluster_display import show_job, show_jobs, show_submitted
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.run_display import watching
from rayfed_lora.errors import RunError
from rayfed_lora.jobs.jobs import Submitted
from rayfed_lora.jobs.views import JobView
from rayfed_lora.pages.comparison_tables import Comparison
from rayfed_lora.pages.table_files import csv_bytes
from rayfed_lora.printable import cell, echo, printable
from rayfed_lora.runs.status import Status
from rayfed_lora.storage import RunFolder

EVIL = "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\x7f\u202etxt.exe\u2066\u2028[bold]x[/nope]"
OBEYED = [chr(code) for code in (7, 8, 0x1B, 0x7F, 0x9B, 0x202E, 0x2066, 0x2028)]


def assert_harmless(text: str) -> None:
    assert "red" in text and "txt.exe" in text
    assert [sign for sign in OBEYED if sign in text] == []


def test_every_control_character_is_written_out():
    for code in [*range(32), 127, *range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]:
        text = printable(f"a{chr(code)}b")
        assert (text == f"a{chr(code)}b") == (chr(code) in "\t\n")
        assert printable(f"a{chr(code)}b", lines=False).isprintable()
    assert printable("déjà vu 你好 🙂 a\u200db\nc\td") == "déjà vu 你好 🙂 a\u200db\nc\td"
    assert printable("line\r\nline\rover") == "line\nline\\rover"
    assert printable("\ud800").encode() == b"\\ud800"


def test_a_console_prints_them_nowhere():
    stream = io.StringIO()
    console = PlainConsole(file=stream, force_terminal=True, width=200)
    console.print(EVIL)
    console.print(EVIL, style="yellow", soft_wrap=True)
    table = Table("name", title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bars:
        bars.add_task(EVIL)
    with console.status(EVIL.replace("[/nope]", "")):
        pass
    text = stream.getvalue()
    for own in ("\x1b[33m", "\x1b[0m"):
        assert own in text
    assert "\x1b[31m" not in text and "\x1b]0;" not in text and "\u202e" not in text
    assert text.count("\\x1b[31mred") >= 5
    # Brackets are not markup either.
    assert "[bold]x[/nope]" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_notes_of_a_run_are_harmless_and_their_lines_are_theirs(terminal):
    stream = io.StringIO()
    console = PlainConsole(file=stream, force_terminal=terminal, width=200, color_system=None)
    with watching(console) as show:
        show(Status(notes=(f"class {EVIL}\nround 1/1 all is well",)))
    text = stream.getvalue()
    assert "warning: class \\x1b[31mred" in text and "\u202e" not in text
    assert "\n  round 1/1 all is well" in text


def test_job_records_are_harmless():
    stream = io.StringIO()
    job = JobView(EVIL, EVIL, "failed", EVIL, message=EVIL)
    console = PlainConsole(file=stream, width=400)
    show_job(console, job, 0.0, EVIL)
    show_jobs(console, [job], EVIL)
    show_submitted(console, Submitted("id", EVIL, (EVIL,)), EVIL, False)
    assert_harmless(stream.getvalue())


def test_logs_keep_their_lines_only(capsys):
    echo(f"one\r\n\ttwo {EVIL}\n", end="")
    assert_harmless(capsys.readouterr().out)


@pytest.mark.parametrize("error", [RunError(EVIL), ValueError(EVIL)])
def test_failures_are_told_without_them(monkeypatch, capsys, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert_harmless(capsys.readouterr().err)


def test_every_command_prints_by_that_console_or_echo():
    from pathlib import Path

    import rayfed_lora

    package = Path(rayfed_lora.__file__).parent
    bare = [
        path.name
        for path in package.rglob("*.py")
        if path.name not in ("console.py", "printable.py")
        for line in path.read_text().splitlines()
        if " Console(" in line or "(Console(" in line or "rich import print" in line
    ]
    assert bare == []


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"])
def test_a_cell_that_begins_like_a_formula_is_text(text):
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["-0.5", "+1e-3", "-inf", -0.5, None, "a=b", "", np.float64(-1)])
def test_numbers_and_plain_texts_are_as_they_were(value):
    assert cell(value) is value


def test_numbers_of_a_table_stay_numbers_and_its_heads_are_texts_too():
    table = pd.DataFrame({"=x": ["-1", "=2", None], "loss": [-0.5, np.nan, 1.0], "n": [-1, 2, 3]})
    assert csv_bytes(table).decode() == "'=x,loss,n\n-1,-0.5,-1\n'=2,,2\n,1.0,3\n"
    mixed = pd.DataFrame({"drawn": [-1.5, "=a", True]})
    assert csv_bytes(mixed).decode() == "drawn\n-1.5\n'=a\nTrue\n"


def test_tables_of_a_comparison_are_neutral(tmp_path, monkeypatch):
    evil = '=HYPERLINK("http://evil")'
    runs = pd.DataFrame({"method": [evil], "seed": [-1], "error": [evil]})
    from rayfed_lora.pages import comparison_tables

    monkeypatch.setattr(comparison_tables, "read_runs", lambda locations, own: [])
    monkeypatch.setattr(comparison_tables, "read_failed", lambda locations: [])
    monkeypatch.setattr(comparison_tables, "write_plots", lambda *given: None)
    monkeypatch.setattr(comparison_tables, "accuracies_of_clients", lambda runs: {})
    monkeypatch.setattr(comparison_tables, "report_html", lambda runs, failed: "")
    Comparison(runs, runs, runs, 0.5).write(RunFolder(tmp_path))
    for name in ("runs", "methods", "rounds"):
        read = pd.read_csv(tmp_path / f"{name}.csv")
        assert read.loc[0].tolist() == [f"'{evil}", -1, f"'{evil}"]
        # Parquet has no formulas: the value is kept.
        assert pd.read_parquet(tmp_path / f"{name}.parquet")["method"][0] == evil


def test_no_module_writes_csv_by_itself():
    from pathlib import Path

    import rayfed_lora

    package = Path(rayfed_lora.__file__).parent
    writers = [p.name for p in package.rglob("*.py") if ".to_csv(" in p.read_text()]
    assert writers == ["table_files.py"]


def test_the_test_of_stdout_prints_at_once(monkeypatch):
    flushed = []
    stream = SimpleNamespace(write=lambda text: None, flush=lambda: flushed.append(True))
    monkeypatch.setattr(sys, "stdout", stream)
    echo("x")
    assert flushed
