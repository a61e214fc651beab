"""Credentials go to endpoints that the user names, never to one that only a recipe names."""

from __future__ import annotations

import json
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayfed_lora
from rayfed_lora import storage
from rayfed_lora.data.raw_tables import read_file
from rayfed_lora.endpoints import endpoint, guarded, own_endpoints, unguarded
from rayfed_lora.errors import DataError, RecipeError, RunFolderError
from rayfed_lora.jobs.jobs import Jobs
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.notes import unused
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs import seals
from rayfed_lora.runs.claiming import differences
from rayfed_lora.storage import RunFolder
from rayfed_lora.tuning.draws import trial_recipe
from rayfed_lora.tuning.search_folders import current_recipe
from rayfed_lora.tuning.space import Space
from tests.fake_jobs import FakeClient
from tests.fakes import RECIPE, FakeFactory

EVIL = "s3://bucket/a.parquet?endpoint_override=evil:9000&scheme=http"
KEYS = ["data.source", "clients.availability.trace", "storage.path"]


def value(recipe: Recipe, key: str) -> str:
    found = recipe
    for part in key.split("."):
        found = getattr(found, part)
    return str(found)


def in_file(key: str, text: str) -> dict:
    """Return the recipe's mapping with that value written in it."""
    raw = json.loads(json.dumps(RECIPE))
    *sections, last = key.split(".")
    inner = raw
    for part in sections:
        inner = inner.setdefault(part, {})
    inner[last] = text
    return raw


@pytest.mark.parametrize("key", KEYS)
def test_an_endpoint_that_only_a_recipe_names_is_asked_anonymously(key):
    loaded = load_recipe(in_file(key, EVIL))
    assert value(loaded, key) == f"{EVIL}&anonymous=true"
    # So it stays, however often it is loaded and checked.
    assert value(load_recipe(loaded), key) == f"{EVIL}&anonymous=true"
    assert value(Recipe(**in_file(key, EVIL)), key) == f"{EVIL}&anonymous=true"
    assert value(Recipe.model_validate(in_file(key, EVIL)), key) == f"{EVIL}&anonymous=true"


def test_the_short_form_of_a_trace_is_guarded_too():
    loaded = load_recipe(in_file("clients.availability", EVIL))
    assert value(loaded, "clients.availability.trace") == f"{EVIL}&anonymous=true"


@pytest.mark.parametrize("key", KEYS)
def test_an_endpoint_that_the_command_line_names_gets_credentials(key):
    loaded = load_recipe(RECIPE, [f"{key}={EVIL}"])
    assert value(loaded, key) == EVIL
    assert value(load_recipe(loaded), key) == EVIL
    assert value(load_recipe(loaded, {"seed": 4}), key) == EVIL


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_the_environment_names_gets_credentials(monkeypatch, name):
    monkeypatch.setenv(name, "http://evil:9000/")
    assert load_recipe(in_file("data.source", EVIL)).data.source == EVIL
    other = EVIL.replace("evil", "worse")
    assert load_recipe(in_file("data.source", other)).data.source.endswith("anonymous=true")
    # The same host without encryption is another place.
    monkeypatch.setenv(name, "https://evil:9000")
    assert load_recipe(in_file("data.source", EVIL)).data.source.endswith("anonymous=true")


def test_further_endpoints_of_the_users_own_are_a_list(monkeypatch):
    monkeypatch.setenv("RAYFED_LORA_ENDPOINTS", "minio, http://EVIL:9000,https://c:443")
    assert {"https://minio", "http://evil:9000", "https://c"} <= own_endpoints()


@pytest.mark.parametrize(
    ("location", "server"),
    [
        ("s3://b/a?endpoint_override=evil&endpoint_override=worse", "https://worse"),
        ("S3://b/a?endpoint_override=http://evil:80", "http://evil"),
        ("s3://b/a?scheme=http", "http://s3"),
        ("gs://b/a?endpoint_override=evil", "https://evil"),
        ("abfss://box@acct.evil.com/a", "https://acct.evil.com"),
        ("abfs://box@a.dfs.core.windows.net/a?blob_storage_authority=.evil.com", None),
        ("s3://b/a?region=eu", None),
        ("abfss://box@a.dfs.core.windows.net/a", None),
        ("/data/a.parquet", None),
        ("hf:some/data", None),
    ],
)
def test_whoever_a_uri_makes_the_server_is_seen(location, server):
    if "authority" in location:
        assert endpoint(location) == "https://a.dfs.core.windows.net,.evil.com"
        return
    assert endpoint(location) == server


@pytest.mark.parametrize(
    ("location", "safe"),
    [
        (
            "s3://b/a?endpoint_override=e&anonymous=false",
            "s3://b/a?endpoint_override=e&anonymous=true",
        ),
        ("gs://b/a?endpoint_override=e", "gs://anonymous@b/a?endpoint_override=e"),
        (
            "abfss://c@a.evil.com/x?credential_kind=default",
            "abfss://c@a.evil.com/x?credential_kind=anonymous",
        ),
    ],
)
def test_guarding_overrules_what_a_stranger_wrote(location, safe):
    assert guarded(location, ()) == safe
    assert guarded(safe, ()) == safe
    assert unguarded(safe) == unguarded(
        location.replace("&anonymous=false", "").replace("?credential_kind=default", "")
    )


@pytest.fixture
def rows(bucket) -> str:
    sink = BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), sink)
    RunFolder(bucket.uri("data")).write("x.parquet", sink.getvalue())
    return bucket.uri("data/x.parquet")


@pytest.mark.parametrize("named", [False, True])
def test_requests_carry_credentials_only_for_the_users_own_endpoint(object_store, rows, named):
    given = {"data.source": rows} if named else {}
    recipe = load_recipe(RECIPE if named else in_file("data.source", rows), given)
    before = len(object_store.signed)
    # The server itself may well refuse what is anonymous.
    try:
        read_file(recipe.data.source, ())
    except rayfed_lora.errors.DataError:
        assert not named
    assert object_store.signed[before:] and set(object_store.signed[before:]) == {named}


@pytest.mark.parametrize("named", [False, True])
def test_a_run_folder_that_the_recipe_names_is_written_without_credentials(
    object_store, bucket, named
):
    path = bucket.uri("runs/a")
    recipe = in_file("storage.path", path)
    before = len(object_store.signed)
    try:
        rayfed_lora.run(recipe, path if named else None, factory=FakeFactory())
    except RunFolderError as error:
        assert not named and "carry no credentials" in str(error)
    assert object_store.signed[before:] and set(object_store.signed[before:]) == {named}


def test_a_resumed_run_is_the_same_with_and_without_credentials():
    without = load_recipe(in_file("data.source", EVIL))
    assert differences(without, load_recipe(RECIPE, {"data.source": EVIL})) == []
    assert differences(without, load_recipe(RECIPE, {"data.source": EVIL + "1"})) == ["data.source"]


def test_a_job_knows_what_the_user_has_named_and_so_does_its_resumption(monkeypatch):
    fake = FakeClient()
    jobs = Jobs(client=fake)
    own = "s3://bucket/runs/a?endpoint_override=minio:9000"
    jobs.submit(load_recipe(in_file("data.source", EVIL)), own)
    environment = fake.sent[-1]["runtime_env"]["env_vars"]
    assert environment["RAYFED_LORA_ENDPOINTS"] == "https://minio:9000"
    jobs.submit(load_recipe(in_file("data.source", EVIL)), "s3://bucket/runs/a")
    assert "RAYFED_LORA_ENDPOINTS" not in fake.sent[-1]["runtime_env"]["env_vars"]
    # On the cluster the file alone would name nothing.
    sent = recipe_yaml(load_recipe(RECIPE, {"data.source": EVIL, "storage.path": own}))
    monkeypatch.setenv("RAYFED_LORA_ENDPOINTS", "https://minio:9000,http://evil:9000")
    loaded = load_recipe(parse_yaml("job", sent))
    assert (loaded.data.source, loaded.storage.path) == (EVIL, own)


def test_a_search_space_names_no_endpoint_as_the_users_own():
    space = Space.model_validate(
        {
            "parameters": {"data.source": {"choice": [EVIL]}},
            "samples": 1,
            "objectives": {"eval_accuracy": "max"},
        }
    )
    found = trial_recipe(space, load_recipe(RECIPE), {"data.source": EVIL})
    assert found.data.source == f"{EVIL}&anonymous=true"


@pytest.mark.parametrize("region", ["x.evil.com", "evil.com/", "a@evil"])
def test_a_region_is_no_host(region):
    with pytest.raises(RunFolderError, match="expected a region such as"):
        RunFolder(f"s3://bucket/a?region={region}")


def test_the_user_is_told_of_requests_without_credentials():
    (note,) = unused(load_recipe(in_file("data.source", EVIL)))
    assert "data.source" in note and "http://evil:9000" in note and "no credentials" in note
    assert unused(load_recipe(RECIPE, {"data.source": EVIL})) == ()


@pytest.mark.parametrize("key", KEYS)
def test_filesystems_that_find_credentials_in_ways_of_their_own_are_refused(key):
    with pytest.raises(RecipeError, match=rf"{key}: expected a path, or a URI of s3"):
        load_recipe(in_file(key, "fsspec+smb://evil/share/a.parquet"))


def test_a_resumed_job_keeps_its_endpoints():
    fake = FakeClient()
    jobs = Jobs(client=fake)
    own = "s3://bucket/runs/a?endpoint_override=minio:9000"
    recipe = load_recipe(in_file("data.source", EVIL))
    job = jobs.submit(recipe, own).id
    fake.jobs[job].status = "FAILED"
    jobs.resume(job)
    assert "--resume" in fake.sent[-1]["entrypoint"]
    assert fake.sent[-1]["runtime_env"]["env_vars"]["RAYFED_LORA_ENDPOINTS"] == "https://minio:9000"
    sent = parse_yaml("job", fake.sent[-1]["files"]["recipe.yaml"])
    assert sent["data"]["source"] == f"{EVIL}&anonymous=true" and sent["storage"]["path"] == own


# The first counts for pyarrow's own filesystems, the last for a mapping of them.
TWICE = [
    "gs://bucket/a.csv?endpoint_override=evil:9000&scheme=http&endpoint_override=&scheme=https",
    "gs://bucket/a.csv?endpoint_override=evil:9000&endpoint%5Foverride=",
    "abfs://box@account/a.csv?blob_storage_authority=.evil.com&blob_storage_authority=",
    "abfs://box@account/a.csv?enable_tls=false&enable_tls=true",
    "s3://bucket/a.csv?endpoint_override=evil:9000&endpoint_override=",
    "s3://bucket/a.csv?region=eu-central-1&endpoint_override=evil:9000&endpoint_override=",
]


@pytest.mark.parametrize("location", TWICE)
def test_an_option_that_a_uri_has_twice_is_refused_by_recipes_and_by_what_opens_it(location):
    for key in KEYS:
        with pytest.raises(RecipeError, match=rf"{key}: expected each option of a URI once, got "):
            load_recipe(in_file(key, location))
    with pytest.raises(DataError, match="expected each option of a URI once"):
        read_file(location, ())
    with pytest.raises(RunFolderError, match="expected each option of a URI once"):
        RunFolder(location)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_a_scheme_alone_names_no_server_where_the_environment_names_one(monkeypatch, name):
    location = "s3://bucket/a?scheme=http"
    assert guarded(location, ()) == f"{location}&anonymous=true"
    monkeypatch.setenv(name, "http://minio:9000")
    assert guarded(location, ()) == location
    other = "s3://bucket/a?scheme=http&endpoint_override=evil:9000"
    assert guarded(other, ()) == f"{other}&anonymous=true"


def test_a_trial_that_goes_on_has_the_credentials_that_its_search_was_given(tmp_path):
    source = "s3://bucket/rows.csv?endpoint_override=minio:9000"
    recipe = load_recipe(RECIPE, {"data.source": source})
    assert recipe.data.source == source
    space = Space.model_validate(
        {
            "parameters": {"annealing.cooling.rank": {"choice": [1, 2]}},
            "samples": 1,
            "objectives": {"eval_accuracy": "max"},
        }
    )
    draw = {"annealing.cooling.rank": 1}
    folder = RunFolder(tmp_path)
    drawn = current_recipe(folder, space, recipe, draw)
    folder.write("recipe.yaml", seals.sealed_text(recipe_yaml(drawn)))
    kept = current_recipe(folder, space, recipe, draw)
    assert kept.data.source == drawn.data.source == source


def test_an_empty_option_names_no_server_and_leaves_the_environments(monkeypatch):
    location = "s3://bucket/a?endpoint_override=&scheme=http"
    assert guarded(location, ()) == f"{location}&anonymous=true"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio:9000")
    # What is opened is the environment's server, with its scheme.
    assert guarded(location, ()) == location
    filesystem, _ = storage.open_filesystem(location)
    options = filesystem.__reduce__()[1][0]
    assert (options["endpoint_override"], options["scheme"]) == ("minio:9000", "https")
