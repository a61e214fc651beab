"""An export needs no memory for the model that it copies."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import rayfed_lora
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.runs import checksums
from rayfed_lora.storage import RunFolder
from tests.fakes import FakeFactory, make_recipe

LARGE = 32 << 20


def test_an_export_copies_large_files_in_parts(tmp_path: Path) -> None:
    rayfed_lora.run(make_recipe(), str(tmp_path / "run"), factory=FakeFactory())
    folder = RunFolder(tmp_path / "run")
    weights = os.urandom(LARGE)
    folder.write("adapter/weights", weights)
    listed = checksums.listed(folder) or {}
    checksums.write(folder, {**listed, "adapter/weights": checksums.sha256(weights)})
    tracemalloc.start()
    try:
        list(export_run(folder.location, tmp_path / "to", merge=False))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LARGE / 2
    assert (tmp_path / "to" / "weights").read_bytes() == weights
