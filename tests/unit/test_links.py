"""A stranger's run folder reads and writes nothing outside of itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import rayfed_lora
from rayfed_lora.errors import BadInputError, RunFolderError
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.runs.seals import damaged
from rayfed_lora.storage import RunFolder
from tests.fakes import RECIPE, FakeFactory, make_recipe

LEADS_OUT = "is a link that leads out of it"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "home" / "secret"
    file.parent.mkdir()
    file.write_text("secret")
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rayfed_lora.run(make_recipe(), str(tmp_path / "run"), factory=FakeFactory())
    return tmp_path / "run"


def linked(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(to)


@pytest.mark.parametrize("relative", [False, True])
def test_an_export_follows_no_link_out_of_the_folder(run, secret, tmp_path, relative):
    to = Path(os.path.relpath(secret, run / "adapter")) if relative else secret
    linked(run / "adapter" / "fake.json", to)
    with pytest.raises(RunFolderError, match=rf"adapter/fake\.json {LEADS_OUT}"):
        list(export_run(str(run), tmp_path / "out", merge=False))
    assert not any(p.is_file() for p in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_an_export_follows_no_linked_folder(run, secret, tmp_path, part):
    linked(run / part, secret.parent)
    with pytest.raises(RunFolderError, match=rf"{part} {LEADS_OUT}"):
        list(export_run(str(run), tmp_path / "out", merge=False))
    assert not list(tmp_path.glob("out/**/secret"))


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "rounds.parquet", "clients.parquet", "summary.json"]
)
def test_a_report_follows_none(run, secret, tmp_path, name):
    linked(run / name, secret)
    with pytest.raises(RunFolderError, match=LEADS_OUT):
        rayfed_lora.report([str(run)], str(tmp_path / "report.html"))


@pytest.mark.parametrize("part", ["checkpoints", "adapter"])
def test_a_run_whose_folder_has_parts_on_another_disk_goes_on_and_is_reported(run, tmp_path, part):
    before = (run / "summary.json").read_bytes()
    (run / part).rename(tmp_path / "disk")
    (run / part).symlink_to(tmp_path / "disk")
    rayfed_lora.report([str(run)], str(tmp_path / "report.html"))
    # Killed before its end.
    (run / "summary.json").unlink()
    (run / "SHA256SUMS").unlink()
    rayfed_lora.report([str(run)], str(tmp_path / "report.html"))
    rayfed_lora.run(make_recipe(), str(run), resume=True, factory=FakeFactory())
    assert len((run / "summary.json").read_bytes()) == pytest.approx(len(before), abs=100)
    assert (run / part).is_symlink() and list((tmp_path / "disk").iterdir())


def test_a_comparison_goes_on_beside_a_run_of_its_own_on_another_disk(tmp_path):
    out = tmp_path / "comparison"
    rayfed_lora.compare(RECIPE, ["sa-fedlora"], str(out), factory=FakeFactory())
    (out / "sa-fedlora").rename(tmp_path / "disk")
    (out / "sa-fedlora").symlink_to(tmp_path / "disk")
    rayfed_lora.compare(RECIPE, ["sa-fedlora", "fedavg"], str(out), factory=FakeFactory())
    assert "fedavg" in (out / "report.html").read_text()


def test_runs_of_a_comparison_are_in_its_folder(tmp_path, run):
    out = tmp_path / "comparison"
    rayfed_lora.compare(RECIPE, ["sa-fedlora"], str(out), factory=FakeFactory())
    (out / "sa-fedlora" / "seed-0").rename(tmp_path / "elsewhere")
    (out / "sa-fedlora" / "seed-0").symlink_to(run)
    with pytest.raises(RunFolderError, match=LEADS_OUT):
        rayfed_lora.report([str(out)])


def test_a_file_is_written_beside_what_a_link_of_its_name_leads_to(tmp_path, secret):
    folder = RunFolder(tmp_path / "run")
    folder.write("x", b"")
    linked(tmp_path / "run" / "report.html", secret)
    folder.write("report.html", b"new")
    assert secret.read_text() == "secret" and (tmp_path / "run" / "report.html").is_file()
    linked(tmp_path / "run" / "plots", secret.parent)
    with pytest.raises(RunFolderError, match=LEADS_OUT):
        folder.confined().write("plots/secret", b"new")
    folder.remove("plots")
    assert secret.read_text() == "secret" and not (tmp_path / "run" / "plots").exists()


def test_links_inside_a_folder_and_to_it_are_followed(run, tmp_path):
    (run / "adapter" / "again.json").symlink_to("fake.json")
    (tmp_path / "linked").symlink_to(tmp_path)
    list(export_run(str(tmp_path / "linked" / "run"), tmp_path / "out", merge=False))
    assert (tmp_path / "out" / "again.json").read_bytes()
    assert not (tmp_path / "out" / "again.json").is_symlink()


def test_a_pipe_in_a_folder_is_named_and_not_waited_for(run, tmp_path):
    (run / "adapter" / "fake.json").unlink()
    os.mkfifo(run / "adapter" / "fake.json")
    with pytest.raises(BadInputError, match=r"expected a file, adapter/fake\.json is no regular"):
        list(export_run(str(run), tmp_path / "out", merge=False))


def test_damage_is_told_as_damage_where_checkpoints_are_on_another_disk(
    run: Path, tmp_path: Path
) -> None:
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    said = str(damaged(RunFolder(run).confined(), "summary.json", "it is missing"))
    assert "summary.json is damaged: it is missing; restore it from a copy" in said
