"""Output that cannot be written or encoded: no traceback, and no run that ends for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.output import safe_output

MAIN = "from rayfed_lora.cli.commands import main; main()"
LINES = """
from rayfed_lora.cli.output import safe_output
with safe_output():
    for i in range(10_000):
        print("line", i, flush=True)
    open({done!r}, "w").close()
"""


def program(text: str, *arguments: str, shell: str = "", **environment: str) -> tuple[int, str]:
    """Run Python code, its output redirected by a shell; return its status and stderr."""
    quoted = ["-c", text, *arguments]
    done = subprocess.run(
        ["bash", "-c", f'"$0" "$@" {shell}; exit ${{PIPESTATUS[0]}}', sys.executable, *quoted],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stderr


def test_a_full_disk_under_the_output_is_told_and_ends_nothing(tmp_path: Path) -> None:
    done = tmp_path / "done"
    status, err = program(LINES.format(done=str(done)), shell="> /dev/full")
    message = "rayfed-lora: cannot write to stdout: No space left on device\n"
    assert (status, err) == (1, message)
    assert done.exists()


@pytest.mark.parametrize("reader", ["| head -n 1", "| true"])
def test_a_reader_that_goes_away_ends_nothing(reader: str, tmp_path: Path) -> None:
    done = tmp_path / "done"
    assert program(LINES.format(done=str(done)), shell=reader) == (0, "")
    assert done.exists()


@pytest.mark.parametrize("shell", ["> /dev/full 2> /dev/full", ">&- 2>&-", "2> /dev/full"])
def test_errors_that_cannot_be_printed_keep_their_status(shell: str) -> None:
    assert program(MAIN, "run", "no-such-recipe", shell=shell)[0] == 2


ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_texts_that_the_encoding_lacks_are_escaped() -> None:
    status, err = program(MAIN, "run", "süß.yaml", PYTHONIOENCODING="ascii")
    assert status == 2
    assert "Traceback" not in err and "s\\xfc\\xdf.yaml" in err


def test_a_folder_whose_name_python_cannot_read_is_one_message(tmp_path: Path) -> None:
    status, err = program(MAIN, "report", str(tmp_path / "süß"), **ASCII_LOCALE)
    assert status == 2
    assert "Traceback" not in err and "PYTHONUTF8=1" in err


def test_the_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with safe_output():
        pass
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("text", ["runs/a[/b]c", "[red]x", "[/]", ":smile:"])
def test_what_looks_like_markup_is_printed_as_it_is(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    PlainConsole().print_line(text)
    PlainConsole().print(text)
    PlainConsole().warn(text)
    assert capsys.readouterr().out == f"{text}\n{text}\nwarning: {text}\n"


def test_a_working_folder_that_is_gone_is_one_message(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    leave = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})"
    status, err = program(MAIN.replace("main()", f"{leave}; main()"), "recipes")
    assert status == 2
    assert err.startswith("rayfed-lora: the working folder was deleted or cannot be read")
