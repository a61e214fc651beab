"""Files that carry their own checksum."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed_lora.runs import seals
from rayfed_lora.runs.tables import ROUNDS_FILE, round_schema
from rayfed_lora.storage import RunFolder


def test_the_table_of_a_run_with_thousands_of_adapted_modules_is_checked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(2_000)]
    seals.write_table(folder, ROUNDS_FILE, round_schema(modules).empty_table())
    path = tmp_path / ROUNDS_FILE
    content = path.read_bytes()
    # The footer describes each module, behind the checksum.
    assert len(content) - content.rfind(b"rayfed-lora sha256 ") > 1 << 16
    assert seals.check(folder, ROUNDS_FILE) is None
    path.write_bytes(content.replace(b"layers.7.self", b"layers.8.self", 1))
    assert "do not match" in (seals.check(folder, ROUNDS_FILE) or "")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff\xff\xff\xffPAR1", b"PAR1\0\0\0\0PAR1"])
def test_a_table_of_a_few_bytes_has_lost_its_checksum(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    fault = seals.check(RunFolder(tmp_path), "x.parquet") or ""
    assert "x.parquet is damaged: it has lost its checksum" in fault
