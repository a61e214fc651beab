"""Whole commands on run folders whose files were damaged, here and in an object store."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from rayfed_lora.storage import RunFolder
from tests.e2e.processes import command, environment, finish, kill, started, wait_for
from tests.e2e.test_kill_and_resume import RECIPE
from tests.object_store import Bucket

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
LOCAL = ("--set", "runtime.executor=local")


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The location of a run folder that is not there yet."""
    if request.param == "local":
        return str(tmp_path / "run")
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.uri("runs/damaged")


def refused(*arguments: str) -> str:
    """Call rayfed-lora, expect exit status 2 and one clear message; return it."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    # The terminal breaks lines; the options of a URI stand behind the file's name.
    return re.sub(r"\?\S*?(?=isdamaged)", "", "".join(done.stderr.split()))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_damaged_files_are_written_again_or_named(out: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    folder = RunFolder(out)

    def saved() -> bool:
        return folder.exists("checkpoints/round-000002/manifest.json")

    with started(command("run", str(recipe), "--out", out, *LOCAL)) as process:
        wait_for(saved, process)
        kill(process)
    # A run that is killed, damaged, and gone on with.
    for name in ("rounds.parquet", "clients.parquet", "recipe.yaml"):
        whole = folder.read(name)
        folder.write(name, flipped(whole))
        assert f"{name}isdamaged" in refused("run", str(recipe), "--out", out, "--resume", *LOCAL)
        assert f"{name}isdamaged" in refused("report", out)
        folder.write(name, whole)
    folder.remove("clients.parquet")
    assert "clients.parquetisdamaged:itismissing" in refused("report", out)
    assert "clients.parquetisdamaged:itismissing" in refused(
        "run", str(recipe), "--out", out, "--resume", *LOCAL
    )


def test_a_finished_run_is_made_whole_by_resume(out: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    folder = RunFolder(out)
    finish("run", str(recipe), "--out", out, *LOCAL)
    before = json.loads(folder.read("summary.json"))
    model = "adapter/adapter_model.safetensors"
    adapter, partition = folder.read(model), folder.read("partition.parquet")
    folder.write(model, flipped(adapter))
    folder.write("partition.parquet", flipped(partition))
    folder.remove("summary.json")
    assert "isdamaged" in refused("report", out)
    finish("run", str(recipe), "--out", out, "--resume", *LOCAL)
    after = json.loads(folder.read("summary.json"))
    assert folder.read(model) == adapter
    assert folder.read("partition.parquet") == partition
    for key in ("final", "best", "communication", "rounds", "adapter_sha256"):
        assert after[key] == before[key]
    finish("report", out)
    folder.write(model, flipped(adapter))
    assert f"{model}isdamaged" in refused("export", out, "--to", str(tmp_path / "b"))
    finish("run", str(recipe), "--out", out, "--resume", *LOCAL)
    finish("export", out, "--to", str(tmp_path / "c"))
    assert (tmp_path / "c" / "adapter_model.safetensors").read_bytes() == adapter
