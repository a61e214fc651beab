"""Whole commands on run folders in an object store, killed and gone on with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rayfed_lora.storage import RunFolder
from tests.e2e.processes import command, environment, finish, kill, started, wait_for
from tests.e2e.test_kill_and_resume import RECIPE
from tests.object_store import Bucket

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(900)]
KEYS = ("adapter_sha256", "final", "best", "communication", "rounds")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_a_run_on_ray_killed_in_an_object_store_ends_as_one_in_a_local_folder(
    recipe: str, bucket: Bucket, tmp_path: Path
) -> None:
    here, there = tmp_path / "run", bucket.uri("runs/a")
    finish("run", recipe, "--out", str(here), "--set", "runtime.executor=local")
    folder = RunFolder(there)

    def saved(rounds: int) -> bool:
        names = folder.names("checkpoints")
        return any(
            name >= f"round-{rounds:06d}" and folder.exists(f"checkpoints/{name}/manifest.json")
            for name in names
        )

    more: list[str] = []
    for rounds in (1, 4):
        with started(command("run", recipe, "--out", there, *more)) as process:
            wait_for(lambda: saved(rounds), process)  # noqa: B023
            kill(process)
        more = ["--resume"]
    finish("run", recipe, "--out", there, "--resume")
    one, other = (json.loads(f.read("summary.json")) for f in (folder, RunFolder(here)))
    assert {key: one[key] for key in KEYS} == {key: other[key] for key in KEYS}
    for name in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
        assert folder.read(name) == (here / name).read_bytes()
    finish("report", there)
    finish("export", there, "--to", str(tmp_path / "exported"), "--merge")
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_the_quick_search_runs_in_an_object_store(recipe: str, bucket: Bucket) -> None:
    out = bucket.uri("searches/quick")
    said = finish("tune", "quick", "--recipe", recipe, "--out", out)
    assert "4 finished" in said or "finished" in said
    folder = RunFolder(out)
    assert len(folder.names("trials")) == 4
    assert {"trials.parquet", "best.yaml", "report.html", "tune"} <= {*folder.names()}


def test_a_bucket_that_is_not_there_is_one_line(recipe: str, bucket: Bucket) -> None:
    location = f"s3://no-such-bucket/a?{bucket.store.options}"
    for arguments in (
        ("run", recipe, "--out", location),
        ("report", location),
        ("tune", "quick", "--recipe", recipe, "--out", location),
    ):
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, check=False, env=environment()
        )
        assert done.returncode == 2
        assert "no-such-bucket" in done.stderr and "Traceback" not in done.stderr
