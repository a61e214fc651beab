"""Run folders in an object store, over the S3 protocol: whole files or none, clear refusals."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest

from rayfed_lora.errors import RunError, RunFolderError
from rayfed_lora.runs import checkpoints
from rayfed_lora.storage import RunFolder
from tests.object_store import Bucket, ObjectStore
from tests.unit.test_checkpoints import (
    assert_same_factors,
    read_back,
    replaced,
    save_checkpoint,
    snapshot,
)

# More than the part that pyarrow sends at once.
LARGE = bytes(12_000_000)


@pytest.fixture
def folder(bucket: Bucket) -> RunFolder:
    return RunFolder(bucket.uri("runs/a"))


def test_what_was_written_is_read_listed_replaced_and_removed(bucket, folder):
    assert folder.local is None
    assert folder.names() == [] and not folder.exists("x")
    folder.write("sub/deep/x", b"first")
    folder.write("sub/deep/x", b"second")
    folder.write("y", b"")
    assert folder.read("sub/deep/x") == b"second"
    assert folder.names() == ["sub", "y"] and folder.is_folder("sub")
    with folder.open_to_read("sub/deep/x") as source:
        assert source.read() == b"second"
    assert bucket.keys() == ["runs/a/sub/deep/x", "runs/a/y"]
    folder.remove("sub")
    folder.remove("not-there")
    assert folder.names() == ["y"]


def test_a_small_file_is_one_request(object_store, folder):
    folder.write("x", b"1")
    before = len(object_store.requests)
    folder.write("x", b"2")
    assert [method for method, _ in object_store.requests[before:]] == ["PUT"]


def test_asking_whether_a_folder_can_be_written_leaves_nothing_in_it(bucket, folder):
    folder.check_writable()
    assert bucket.keys() == []
    assert not folder.exists("")


def test_a_large_file_comes_in_parts_and_back_whole(object_store, folder):
    before = len(object_store.requests)
    folder.write("large", LARGE + b"end")
    assert sum("partNumber" in url for _, url in object_store.requests[before:]) >= 2
    assert folder.read("large") == LARGE + b"end"


def in_parts(method: str, url: str) -> bool:
    return "partNumber=2" in url


def at_once(method: str, url: str) -> bool:
    return method == "PUT"


@pytest.mark.parametrize(("content", "refuse"), [(b"new", at_once), (LARGE, in_parts)])
def test_an_upload_that_fails_is_a_run_error_and_leaves_the_old_content(
    object_store, folder, content, refuse
):
    folder.write("x", b"old")
    with (
        object_store.refusing(refuse),
        pytest.raises(RunError, match=r"cannot write bucket-\d+/runs/a/x: .*ACCESS_DENIED"),
    ):
        folder.write("x", content)
    assert folder.read("x") == b"old"


def test_what_fails_before_its_end_is_not_uploaded(bucket, folder):
    folder.write("x", b"old")
    with pytest.raises(KeyboardInterrupt), folder.open_to_write("x") as stream:
        stream.write(LARGE)
        raise KeyboardInterrupt
    assert folder.read("x") == b"old"
    assert bucket.keys() == ["runs/a/x"]


def test_a_checkpoint_comes_back_and_old_ones_are_removed(bucket, folder):
    writer = checkpoints.CheckpointWriter(folder, keep=2)
    for rounds in (1, 2, 3):
        writer.write(snapshot(rounds, replaced(rounds)))
    found = read_back(folder)
    assert found.rounds == 3
    assert_same_factors(found.state.factors, snapshot(3).state.factors)
    assert found.base.tensors is not None
    np.testing.assert_array_equal(found.base.tensors["z.weight"], replaced(3).tensors["z.weight"])
    assert folder.names("checkpoints") == [
        "base-000002.safetensors",
        "base-000003.safetensors",
        "round-000002",
        "round-000003",
    ]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_whose_upload_fails_leaves_the_older_one_in_use(object_store, folder, file):
    save_checkpoint(folder, snapshot(4), keep=1)
    with object_store.refusing(lambda method, url: method == "PUT" and file in url):
        with pytest.raises(RunError, match="cannot write"):
            save_checkpoint(folder, snapshot(5), keep=1)
    found = checkpoints.newest(folder, lambda text: None)
    assert found is not None
    assert_same_factors(found.state.factors, snapshot(4).state.factors)


def test_files_of_a_checkpoint_come_before_its_manifest(object_store, folder):
    before = len(object_store.requests)
    save_checkpoint(folder, snapshot(1, replaced(1)), keep=1)
    puts = [url for method, url in object_store.requests[before:] if method == "PUT"]
    assert "manifest.json" in puts[-1] and len(puts) == 4


def test_a_bucket_that_does_not_exist_is_named(object_store):
    folder = RunFolder(f"s3://no-such-bucket/runs/a?{object_store.options}")
    with pytest.raises(RunFolderError, match=r"no-such-bucket.*does not exist.*credentials"):
        folder.check_writable()


def test_a_refused_request_names_the_folder_and_where_credentials_come_from(object_store, folder):
    with object_store.refusing(lambda method, url: True):
        for ask in (lambda: folder.exists("x"), folder.names, folder.check_writable):
            with pytest.raises(RunFolderError, match=r"s3://bucket-\d+/runs/a.*credentials come"):
                ask()


def test_a_server_that_is_not_there_is_an_error_within_seconds():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    folder = RunFolder(f"s3://b/a?endpoint_override=127.0.0.1:{port}&scheme=http&region=eu")
    began = time.perf_counter()
    with pytest.raises(RunFolderError, match=r"Failed to connect|connect"):
        folder.exists("recipe.yaml")
    assert time.perf_counter() - began < 15


@pytest.mark.e2e
def test_a_server_that_never_answers_is_an_error_within_seconds():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        folder = RunFolder(f"s3://b/a?endpoint_override={place}&scheme=http&region=eu")
        began = time.perf_counter()
        with pytest.raises(RunFolderError, match="Timeout"):
            folder.exists("recipe.yaml")
        assert time.perf_counter() - began < 40


def test_the_endpoint_may_come_from_the_environment(object_store: ObjectStore, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{object_store.port}")
    RunFolder(f"s3://{bucket.name}/runs/b").write("x", b"1")
    assert bucket.keys() == ["runs/b/x"]


@pytest.mark.parametrize(
    "location",
    [
        "s3://AKIA:sEcret@bucket/a",
        "s3://AKIA:sEc/ret@bucket/a",
        "s3://AKIA@bucket/a",
        "gs://b/a?access_token=sEcret",
        "hdfs://user:sEcret@host/a",
        "abfss://box@account.dfs.core.windows.net/a?sas_token=sEcret",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(location):
    with pytest.raises(RunFolderError, match="without credentials") as refused:
        RunFolder(location)
    assert "sEcret" not in str(refused.value) and "AKIA" not in str(refused.value)


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("s3://bucket/a?retries=7", "got retries"),
        ("s3:///a", "got no bucket"),
        ("s3://bucket/a/../b", "inside the folder"),
        ("s3://bucket/a?region", "bad query field"),
        ("a\0b", "NUL"),
    ],
)
def test_a_uri_that_makes_no_sense_is_refused(location, complaint):
    with pytest.raises(RunFolderError, match=complaint):
        RunFolder(location)
