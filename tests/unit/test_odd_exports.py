"""An export of something odd, or to somewhere odd, is one clear message with status 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import rayfed_lora
from rayfed_lora.cli import commands as cli
from tests.fakes import FakeFactory, make_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    rayfed_lora.run(make_recipe(), str(folder), factory=FakeFactory())
    return folder


def older(run: Path) -> None:
    """Make a folder as older versions wrote it, without checksums."""
    (run / "SHA256SUMS").unlink()
    summary = json.loads((run / "summary.json").read_text())
    del summary["checksums"]
    (run / "summary.json").write_text(json.dumps(summary))


def without_adapter(run: Path) -> None:
    shutil.rmtree(run / "adapter")


def half(run: Path) -> None:
    (run / "adapter/adapter_config.json").unlink()


def weightless(run: Path) -> None:
    (run / "adapter/adapter_model.safetensors").unlink()


def of_another_run(run: Path) -> None:
    (run / "adapter/fake.json").write_text('{"energy": 1.0}')


def broken_summary(run: Path) -> None:
    (run / "summary.json").write_text('{"final": ')


def config_that_says(text: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        older(run)
        (run / "adapter/adapter_config.json").write_text(text)

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        for each in changes:
            each(run)

    return change


RUNS = {
    "no adapter": (without_adapter, "it is missing"),
    "half an adapter": (half, r"adapter_config\.json.* missing"),
    "no weights": (weightless, r"adapter_model\.safetensors.* missing"),
    "another run's": (of_another_run, r"fake\.json.* do not match"),
    "broken summary": (broken_summary, r"summary\.json.* do not match"),
    "older, no adapter": (both(older, without_adapter), "has no adapter"),
    "older, half an adapter": (both(older, half), r"adapter: expected adapter_config\.json"),
    "older, no weights": (both(older, weightless), r"adapter: expected adapter_model\.safetens"),
    "older, broken summary": (both(older, broken_summary), r"summary\.json.* cannot be read"),
    "older, broken configuration": (config_that_says("{"), r"config\.json cannot be read"),
    "older, no object": (config_that_says("[]"), r"config\.json cannot be read"),
    "older, no base": (config_that_says("{}"), r"'base_model_name_or_path'"),
}


def status_of(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["rayfed-lora", "export", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return int(left.value.code or 0), error


@pytest.mark.parametrize("kind", RUNS)
def test_a_damaged_run_is_named(
    kind: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, said = RUNS[kind]
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    change(run)
    arguments = [str(run), "--to", str(tmp_path / "to")]
    status, error = status_of(arguments, monkeypatch, capsys)
    assert status == 2
    assert re.search(said, error.replace("\n", " ")), error
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["adapter", "merged"])
@pytest.mark.parametrize("folder", ["", "nowhere", "run/adapter", "run/recipe.yaml"])
def test_what_is_no_run_folder_is_named(
    folder: str,
    merge: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = str(finished.parent / folder)
    arguments = [given, "--to", str(tmp_path / "to"), *merge]
    status, error = status_of(arguments, monkeypatch, capsys)
    assert status == 2
    assert given.rstrip("/") in error.replace("\n", "")


def test_an_older_run_without_a_model_is_not_merged(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    older(run)
    without_adapter(run)
    arguments = [str(run), "--to", str(tmp_path / "to"), "--merge"]
    status, error = status_of(arguments, monkeypatch, capsys)
    assert (status, "it has neither" in error) == (2, True)


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["adapter", "merged"])
@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("run/exported", "outside of the run folder"),
        ("run", "expected a new or empty folder"),
        ("run/recipe.yaml", "expected a new or empty folder"),
        ("file/to", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("link", "cannot be written"),
    ],
)
def test_a_target_that_cannot_be_used_is_named(
    to: str,
    said: str,
    merge: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (tmp_path / "link").symlink_to("link")
    (tmp_path / "file").write_text("mine")
    before = sorted(run.rglob("*"))
    arguments = [str(run), "--to", str(tmp_path / to), *merge]
    status, error = status_of(arguments, monkeypatch, capsys)
    assert status == 2
    assert said in error
    assert sorted(run.rglob("*")) == before


def test_the_help_has_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rayfed-lora", "export", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "rayfed-lora export runs/a --to adapter" in capsys.readouterr().out
