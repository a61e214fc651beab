"""Whatever lies in a checkpoint's files: an older checkpoint, or an error of our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfed_lora.errors import RayfedError, RunFolderError
from rayfed_lora.pages.report import report
from rayfed_lora.runs import checkpoints
from rayfed_lora.runs.checksums import read_summary
from rayfed_lora.runs.claiming import kept_recipe
from rayfed_lora.runs.session import simulate_rounds
from rayfed_lora.runs.status import StatusBoard
from rayfed_lora.storage import RunFolder
from tests.fakes import local_engine, make_recipe

REPORTED = (
    "recipe.yaml",
    "rounds.parquet",
    "clients.parquet",
    "partition.parquet",
    "summary.json",
)
QUICK = settings(max_examples=25, deadline=None)
FOLDER = "checkpoints/round-000002"
FILES = ("manifest.json", "state.json", "state.safetensors")
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@cache
def run_of_two_rounds() -> dict[str, bytes]:
    """Return the files of a run with two whole checkpoints, the base replaced."""
    with TemporaryDirectory() as path:
        folder, recipe = RunFolder(path), make_recipe()
        going = simulate_rounds(
            recipe, local_engine(recipe), folder, StatusBoard(6), lambda: False, resume=False
        )
        for tables in going:
            if tables.rounds.num_rows == 2:
                going.close()
        root = Path(path)
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def after(change: Callable[[RunFolder], None], use: Callable[[RunFolder], Any]) -> Any:
    """Change the files of the run and return what comes of using it, errors of our own too."""
    with TemporaryDirectory() as path:
        folder = RunFolder(path)
        for name, content in run_of_two_rounds().items():
            folder.write(name, content)
        change(folder)
        try:
            return use(folder)
        except RayfedError as error:
            assert str(error)
            return error


def newest(folder: RunFolder) -> checkpoints.Snapshot | None:
    return checkpoints.newest(folder, lambda text: None)


def go_on(folder: RunFolder) -> dict[str, Any]:
    recipe = make_recipe()
    going = simulate_rounds(
        recipe,
        local_engine(recipe),
        folder,
        StatusBoard(6),
        lambda: False,
        resume=True,
        page=False,
    )
    next(going)
    going.close()
    return {}


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a content with bytes flipped, cut off, put in or taken out."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(start + 30, len(content))))
    kind = draw(st.sampled_from(["cut", "replaced", "flipped"]))
    if kind == "cut":
        return content[:start]
    if kind == "replaced":
        return content[:start] + draw(st.binary(max_size=12)) + content[end:]
    return content[:start] + bytes(b ^ 0x55 for b in content[start:end]) + content[end:]


@QUICK
@given(data=st.data(), file=st.sampled_from(FILES))
def test_damaged_bytes_are_noticed_and_the_checkpoint_before_is_used(
    data: st.DataObject, file: str
) -> None:
    whole = run_of_two_rounds()[f"{FOLDER}/{file}"]
    content = data.draw(damage(whole))
    found = after(lambda folder: folder.write(f"{FOLDER}/{file}", content), newest)
    assert isinstance(found, checkpoints.Snapshot)
    # JSON may be changed in what means nothing, such as its spaces.
    assert found.rounds == 1 or content == whole or file == "manifest.json"


def sealed(folder: RunFolder, file: str, content: bytes) -> None:
    """Write a file of the newest checkpoint with a manifest that says it is whole."""
    folder.write(f"{FOLDER}/{file}", content)
    manifest = json.loads(folder.read(f"{FOLDER}/manifest.json"))
    manifest["files"][file] = hashlib.sha256(content).hexdigest()
    folder.write(f"{FOLDER}/manifest.json", json.dumps(manifest).encode())


@QUICK
@given(data=st.data(), file=st.sampled_from(FILES[1:]))
def test_bytes_with_a_checksum_that_fits_are_taken_or_refused(
    data: st.DataObject, file: str
) -> None:
    content = data.draw(damage(run_of_two_rounds()[f"{FOLDER}/{file}"]))
    found = after(lambda folder: sealed(folder, file, content), newest)
    assert isinstance(found, checkpoints.Snapshot)


@st.composite
def another(draw: st.DrawFn, value: Any) -> Any:
    """Draw JSON with one value replaced by any other, or taken out."""
    if not isinstance(value, dict) or not value or (draw(st.booleans()) and draw(st.booleans())):
        return draw(JSON)
    # What a tensor is called can be known by training only.
    key = draw(st.sampled_from(sorted(value.keys() - {"dense_order"})))
    rest = {k: v for k, v in value.items() if k != key}
    return (
        rest
        if draw(st.booleans()) and draw(st.booleans())
        else {**rest, key: draw(another(value[key]))}
    )


@QUICK
@given(data=st.data(), file=st.sampled_from(FILES[:2]))
def test_json_with_any_other_value_is_taken_or_refused_when_a_run_goes_on(
    data: st.DataObject, file: str
) -> None:
    value = data.draw(another(json.loads(run_of_two_rounds()[f"{FOLDER}/{file}"])))
    content = json.dumps(value).encode()

    def change(folder: RunFolder) -> None:
        if file == "manifest.json":
            folder.write(f"{FOLDER}/{file}", content)
        else:
            sealed(folder, file, content)

    found = after(change, go_on)
    assert found == {} or isinstance(found, RayfedError)


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": 2, "base": None, "files": {"../../recipe.yaml": "x"}},
        {"format": 2, "base": {"name": "/etc/passwd", "sha256": "x"}, "files": {}},
        {"format": 2, "base": None, "files": ["state.json"]},
        [],
    ],
)
def test_a_manifest_cannot_name_files_outside_of_the_run(manifest: Any) -> None:
    content = json.dumps(manifest).encode()
    found = after(lambda folder: folder.write(f"{FOLDER}/manifest.json", content), newest)
    assert isinstance(found, checkpoints.Snapshot)
    assert found.rounds == 1


def test_json_nested_without_end_is_damage() -> None:
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for file in FILES[:2]:
        found = after(lambda folder: sealed_or_not(folder, file, deep), newest)  # noqa: B023
        assert found.rounds == 1


def sealed_or_not(folder: RunFolder, file: str, content: bytes) -> None:
    if file == "manifest.json":
        folder.write(f"{FOLDER}/{file}", content)
    else:
        sealed(folder, file, content)


@QUICK
@given(
    data=st.data(),
    name=st.sampled_from(["recipe.yaml", "rounds.parquet", "clients.parquet"]),
)
def test_a_run_whose_other_files_are_damaged_goes_on_or_is_refused(
    data: st.DataObject, name: str
) -> None:
    content = data.draw(damage(run_of_two_rounds()[name]))

    def use(folder: RunFolder) -> dict[str, Any]:
        kept_recipe(folder)
        return go_on(folder)

    found = after(lambda folder: folder.write(name, content), use)
    assert found == {} or isinstance(found, RayfedError)


# A page is five megabytes.
@settings(QUICK, max_examples=8)
@given(data=st.data(), name=st.sampled_from(REPORTED))
def test_a_run_with_any_damage_is_reported_or_refused(data: st.DataObject, name: str) -> None:
    files = run_of_two_rounds()
    content = data.draw(damage(files.get(name, b"{}")))
    if name == "summary.json":
        content = data.draw(
            st.one_of(JSON.map(lambda value: json.dumps(value).encode()), st.just(content))
        )
    found = after(
        lambda folder: folder.write(name, content), lambda folder: report([folder.location])
    )
    assert isinstance(found, (str, RayfedError))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_summary_that_is_no_summary_is_refused(content: bytes) -> None:
    found = after(lambda folder: folder.write("summary.json", content), read_summary)
    assert isinstance(found, RunFolderError)
