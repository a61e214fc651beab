"""Jobs as a user meets them, with a fake of Ray's client in place of a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.cli.cluster_display import show_job, show_jobs, show_stopped, show_submitted
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.errors import BadInputError, InterruptedRunError, ResourceError, RunError
from rayfed_lora.jobs import dashboard
from rayfed_lora.jobs.dashboard import (
    dashboard_url,
    is_dashboard,
    translated_errors,
    unreachable_cluster,
)
from rayfed_lora.jobs.jobs import Jobs
from rayfed_lora.jobs.local_files import files_named
from rayfed_lora.jobs.views import (
    JobProgress,
    JobView,
    exit_status,
    run_metadata,
)
from rayfed_lora.plugins import weight
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.runs.status import Status
from tests.fake_jobs import Details, FakeClient
from tests.fakes import make_recipe


def progress(**changes: Any) -> JobProgress:
    values = {
        "phase": "training",
        "rounds_done": 6,
        "rounds": 30,
        "running": 7,
        "stage": "cooling",
        "rank": 12,
        "loss": 0.3,
        "accuracy": 0.8,
        "eta_s": 72.0,
        "told_at": 100.0,
    }
    return JobProgress.model_validate(values | changes)


def told(job: Details, **changes: Any) -> None:
    assert job.metadata is not None
    job.metadata["rayfed_lora.progress"] = progress(**changes).model_dump_json()


def shown(show: Callable[..., None], *arguments: Any) -> str:
    console = PlainConsole(width=160)
    with console.capture() as capture:
        show(console, *arguments)
    return capture.get()


def test_a_recipe_travels_as_a_file_and_the_shell_reads_fixed_text_only(tmp_path: Path) -> None:
    client = FakeClient()
    recipe = make_recipe(model__config={"architecture": "$(touch x)"})
    out = "/shared/a b; rm -rf $HOME"
    submitted = Jobs(client=client).submit(recipe, out)
    (sent,) = client.sent
    assert sent["entrypoint"] == "rayfed-lora run recipe.yaml"
    assert list(sent["files"]) == ["recipe.yaml"]
    travelled = load_recipe(parse_yaml("recipe", sent["files"]["recipe.yaml"]))
    assert travelled.storage.path == out
    assert travelled.model == recipe.model
    assert submitted.location == out
    assert sent["metadata"]["recipe"] == "fake"
    assert sent["metadata"]["run folder"] == out
    # Time to save the run, in place of Ray's three seconds.
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert not Path(sent["runtime_env"]["working_dir"]).exists()


def test_a_module_of_own_methods_travels_and_one_of_a_script_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten_methods: None
) -> None:
    source = (
        "from rayfed_lora.plugins import weight\n\n@weight()\ndef twice(report):\n    return 2.0\n"
    )
    (tmp_path / "methods_of_a_job.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    client, settings = FakeClient(), {"clients.weight": "twice"}
    jobs = Jobs(client=client)
    done = jobs.submit(make_recipe(), "/shared/a", settings=settings, plugins=["methods_of_a_job"])
    (sent,) = client.sent
    assert sent["files"].pop("methods_of_a_job.py") == source
    assert list(sent["files"]) == ["recipe.yaml"]
    assert sent["entrypoint"] == "rayfed-lora run recipe.yaml --plugins methods_of_a_job"
    assert not [note for note in done.notes if "methods_of_a_job" in note]

    @weight()
    def thrice(report):
        return 3.0

    with pytest.raises(BadInputError, match="weight 'thrice' is defined in a notebook, a script"):
        jobs.submit(make_recipe(), "/shared/b", settings={"clients.weight": "thrice"})
    assert len(client.sent) == 1


def test_a_module_of_own_rows_travels_and_its_name_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten_methods: None
) -> None:
    source = (
        "from rayfed_lora.plugins import data\n\n\n@data('rows.csv.of.a.job')\n"
        "def rows(*, count: int = 3):\n    return []\n"
    )
    (tmp_path / "rows_of_a_job.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    client = FakeClient()
    for name in ("rows.csv.of.a.job", "rows_of_a_job:rows"):
        settings = {"data.source": name, "data.count": 5}
        plugins = ["rows_of_a_job"]
        done = Jobs(client=client).submit(
            make_recipe(), "/shared/a", settings=settings, plugins=plugins
        )
        sent = client.sent[-1]
        assert sent["files"]["rows_of_a_job.py"] == source
        travelled = parse_yaml("recipe", sent["files"]["recipe.yaml"])["data"]
        assert (travelled["source"], travelled["count"]) == (name, 5)
        assert not [note for note in done.notes if "data.source" in note]


def test_a_job_without_a_folder_gets_one_that_outlives_it_and_says_where_it_is() -> None:
    client = FakeClient()
    submitted = Jobs(client=client).submit(make_recipe())
    assert submitted.location == f"~/rayfed-lora-runs/{submitted.id}"
    assert submitted.id.startswith("fake-")
    assert "is on the head node's disk and is lost with it" in submitted.notes[0]
    text = shown(show_submitted, submitted, "http://a b:1", False)
    lines = text.splitlines()[-4:]
    assert lines == [
        f"job: {submitted.id}",
        f"run folder: {submitted.location}",
        f"progress: rayfed-lora status {submitted.id} --address 'http://a b:1'",
        f"output: rayfed-lora logs {submitted.id} --follow --address 'http://a b:1'",
    ]


def test_a_job_takes_the_folder_of_the_recipe_where_no_other_is_given() -> None:
    recipe = make_recipe(storage__path="s3://bucket/a")
    submitted = Jobs(client=FakeClient()).submit(recipe)
    assert (submitted.location, submitted.notes) == ("s3://bucket/a", ())
    assert Jobs(client=FakeClient()).submit(recipe, "/b").location == "/b"


def test_a_folder_with_credentials_in_its_uri_is_refused_before_it_is_sent() -> None:
    client = FakeClient()
    with pytest.raises(BadInputError, match="without credentials"):
        Jobs(client=client).submit(make_recipe(), "s3://AKIA:sEcret@bucket/runs/a")
    assert client.sent == []


def test_a_relative_folder_is_refused_since_a_jobs_own_is_temporary() -> None:
    client = FakeClient()
    with pytest.raises(BadInputError, match="'runs/a': expected an absolute path") as refusal:
        Jobs(client=client).submit(make_recipe(), "runs/a")
    assert "the working folder of a Ray job is temporary" in str(refusal.value)
    with pytest.raises(BadInputError, match="--resume: give --out"):
        Jobs(client=client).submit(make_recipe(), resume=True)
    assert client.sent == []


def test_files_that_a_recipe_names_are_named_absolutely_and_said_not_to_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    client = FakeClient()
    recipe = make_recipe(data__source="texts.csv")
    submitted = Jobs(client=client).submit(recipe, "/out")
    where = str(tmp_path / "texts.csv")
    assert submitted.notes == (
        f"data.source: {where} is not sent along: every node of the cluster needs it under this"
        " path",
    )
    travelled = load_recipe(parse_yaml("recipe", client.sent[0]["files"]["recipe.yaml"]))
    assert travelled.data.source == where


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.source", "gone.parquet"), ("data.source", "~/a.csv"), ("model.source", "../model")],
)
def test_relative_paths_to_nothing_are_refused(key: str, value: str) -> None:
    recipe = make_recipe(**{key.replace(".", "__"): value})
    with pytest.raises(BadInputError, match=f"{key}: '{value}' is not here"):
        files_named(recipe)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("data.source", "digits", []),
        ("data.source", "s3://bucket/a.parquet", []),
        ("data.source", "/on/the/nodes.parquet", [("data.source", "/on/the/nodes.parquet")]),
        ("model.source", "org/model-1.5", []),
        ("model.source", "package:some_package", []),
    ],
)
def test_what_every_node_finds_by_itself_needs_no_word(key, value, named) -> None:
    assert files_named(make_recipe(**{key.replace(".", "__"): value})) == named


def test_jobs_of_recipes_are_listed_also_those_of_plain_ray_job_submit() -> None:
    client = FakeClient()
    ours = Jobs(client=client).submit(make_recipe(), "/out").id
    client.jobs["other"] = Details("other", "python train.py", {"job": "x"})
    client.jobs["plain"] = Details("plain", "rayfed-lora run digits-vit", None)
    client.jobs["path"] = Details("path", "/venv/bin/rayfed-lora run digits-vit", {})
    client.jobs["doctor"] = Details("doctor", "rayfed-lora doctor")
    client.jobs["driver"] = Details(None, "rayfed-lora run digits-vit")
    assert [job.id for job in Jobs(client=client).all()] == [ours, "plain", "path"]
    text = shown(show_jobs, Jobs(client=client).all(), None)
    assert "pending" in text
    assert "other" not in text
    assert "no job of rayfed-lora" in shown(show_jobs, [], None)
    strange = JobView("[/b]", "[red]x", "running", "[/]", progress(phase="[/]"))
    assert "[/b]" in shown(show_jobs, [strange], None)
    assert "[red]x" in shown(show_job, strange, 0.0, None)


def test_status_tells_stage_round_metric_and_time_left() -> None:
    client = FakeClient()
    job = Jobs(client=client).submit(make_recipe(), "/out").id
    client.jobs[job].status = "RUNNING"
    view = Jobs(client=client).status(job)
    assert view.standing == "starting"
    told(client.jobs[job])
    view = Jobs(client=client).status(job)
    line = "round 7/30 cooling rank 12, train loss 0.300, test accuracy 0.800, ETA 1:12"
    assert view.standing == line
    text = shown(show_job, view, 103.0, None)
    assert f"progress    {line} (3 s ago)" in text
    assert "run folder  /out" in text
    assert "recipe      fake" in text


def test_an_ended_job_tells_of_its_finished_rounds_only() -> None:
    client = FakeClient()
    job = Jobs(client=client).submit(make_recipe(), "/out").id
    told(client.jobs[job])
    client.jobs[job].status = "STOPPED"
    view = Jobs(client=client).status(job)
    assert view.standing == "6 of 30 rounds done, train loss 0.300, test accuracy 0.800"
    assert "s ago" not in shown(show_job, view, 103.0, None)
    told(client.jobs[job], phase="starting", rounds_done=0, loss=None, accuracy=None, eta_s=None)
    assert Jobs(client=client).status(job).standing == "0 of 30 rounds done"


@pytest.mark.parametrize(
    "text", ["{", '"training"', '{"phase": 1}', '{"phase": "training", "rounds": "many"}']
)
def test_progress_of_another_form_counts_as_none(text: str) -> None:
    assert JobProgress.read(text) is None
    assert JobProgress.read(None) is None


def test_a_failed_job_shows_the_message_of_the_command() -> None:
    message = (
        "Job entrypoint command failed with exit code 1, last available logs (truncated):\n"
        "round 1/3\nrayfed-lora: client 3 failed in round 1:\nValueError: no\n"
    )
    failed = Details("a", "rayfed-lora run x", {}, "FAILED", message, driver_exit_code=1)
    view = Jobs(client=FakeClient({"a": failed})).status("a")
    assert view.message == "rayfed-lora: client 3 failed in round 1:\nValueError: no"
    assert "ValueError: no" in shown(show_job, view, 0.0, None)
    killed = Details("a", "rayfed-lora run x", {}, "FAILED", "Job supervisor actor died.")
    view = Jobs(client=FakeClient({"a": killed})).status("a")
    assert view.message == "Job supervisor actor died."
    absent = Details("a", "rayfed-lora run x", {}, "FAILED", "x", driver_exit_code=127)
    view = Jobs(client=FakeClient({"a": absent})).status("a")
    assert "not on the PATH of the head node's Ray" in view.message


@pytest.mark.parametrize("job", ["nope", "../../api", "a b", "-x", ""])
def test_a_job_that_is_not_there_is_bad_input(job: str) -> None:
    jobs = Jobs(client=FakeClient())
    for ask in (jobs.status, jobs.stop, jobs.resume):
        with pytest.raises(BadInputError, match="job"):
            ask(job)


def test_stop_waits_for_the_end_and_says_how_to_go_on() -> None:
    client = FakeClient()
    job = Jobs(client=client).submit(make_recipe(), "/out").id
    told(client.jobs[job])
    view = Jobs(client=client).stop(job)
    text = shown(show_stopped, view, None)
    assert text.startswith(
        f"job {job} stopped: 6 of 30 rounds done, train loss 0.300, test accuracy 0.800;"
    )
    assert f"its checkpoint is kept in /out\nto resume: rayfed-lora resume {job}\n" in text
    with pytest.raises(BadInputError, match="has ended already"):
        Jobs(client=client).stop(job)


def test_a_stop_before_the_first_round_and_one_that_came_too_late_say_so() -> None:
    early = JobView("a", "fake", "stopped", "/out", progress(rounds_done=0))
    assert shown(show_stopped, early, None) == "job a stopped before its first round was done\n"
    late = JobView("a", "fake", "succeeded", "/out", progress())
    assert shown(show_stopped, late, None) == "job a had finished; run folder: /out\n"


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_stop_of_a_job_whose_run_has_finished_says_that_and_not_that_it_can_go_on(
    state: str,
) -> None:
    # Its command was still at its last lines, or at ending Ray, when the signal came.
    done = JobView("a", "fake", state, "/out", progress(phase="done", rounds_done=30))
    assert shown(show_stopped, done, None) == "job a had finished; run folder: /out\n"


def test_a_stop_after_the_last_round_and_before_the_export_can_go_on() -> None:
    last = JobView(
        "a",
        "fake",
        "stopped",
        "/out",
        progress(phase="exporting", rounds_done=30),
        recipe_yaml="name: fake",
    )
    assert "to resume: rayfed-lora resume a" in shown(show_stopped, last, None)


def test_a_stop_of_a_job_that_had_told_nothing_claims_nothing() -> None:
    silent = JobView("a", "fake", "stopped", "/out")
    text = shown(show_stopped, silent, None)
    assert text == "job a stopped; it had reported no progress of its run; run folder: /out\n"


def test_a_stopped_job_whose_run_has_finished_is_not_gone_on_with() -> None:
    client = FakeClient()
    job = Jobs(client=client).submit(make_recipe(), "/out").id
    told(client.jobs[job], phase="done", rounds_done=30)
    client.jobs[job].status = "STOPPED"
    with pytest.raises(BadInputError, match="has finished; its run folder: /out"):
        Jobs(client=client).resume(job)


def test_a_job_that_does_not_end_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfed_lora.jobs.jobs.STOP_WAIT_S", -10)
    client = FakeClient()
    job = Jobs(client=client).submit(make_recipe(), "/out").id
    monkeypatch.setattr(client, "stop_job", lambda job: True)
    with pytest.raises(RunError, match="has not ended"):
        Jobs(client=client).stop(job)


def test_resume_submits_the_same_recipe_into_the_same_folder() -> None:
    client = FakeClient()
    jobs = Jobs(client=client)
    first = jobs.submit(make_recipe(seed=7), "/out")
    jobs.stop(first.id)
    again = jobs.resume(first.id)
    assert again.id != first.id
    assert again.location == "/out"
    assert client.sent[1]["entrypoint"] == "rayfed-lora run recipe.yaml --resume"
    assert client.sent[1]["files"] == client.sent[0]["files"]


def test_resume_refuses_what_runs_is_done_or_unknown() -> None:
    client = FakeClient()
    jobs = Jobs(client=client)
    job = jobs.submit(make_recipe(), "/out").id
    with pytest.raises(BadInputError, match="is still pending"):
        jobs.resume(job)
    client.jobs[job].status = "SUCCEEDED"
    with pytest.raises(BadInputError, match="has finished; its run folder: /out"):
        jobs.resume(job)
    client.jobs[job] = Details(job, "rayfed-lora run x", {}, "FAILED")
    with pytest.raises(BadInputError, match="ended before it reported its recipe"):
        jobs.resume(job)
    for text in ("[1]", "{", "name: 3"):
        broken = {**run_metadata(make_recipe(), "/out"), "rayfed_lora.recipe": text}
        client.jobs[job] = Details(job, "rayfed-lora run x", broken, "FAILED")
        with pytest.raises(BadInputError, match="cannot be read"):
            jobs.resume(job)


def test_a_log_is_followed_over_a_broken_connection_without_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayfed_lora.jobs.jobs._POLL_S", 0.0)
    client = FakeClient(tail=["one\ntwo\n", "broken", "three\n"])
    job = Jobs(client=client).submit(make_recipe(), "/out").id
    seen: list[str] = []
    view = Jobs(client=client).follow(job, seen.append)
    assert "".join(seen) == "one\ntwo\nthree\n"
    assert exit_status(view) == 0
    assert Jobs(client=client).logs(job) == "one\ntwo\nthree\n"


def test_who_stops_following_does_not_stop_the_job() -> None:
    client = FakeClient(tail=["one\n"])
    job = Jobs(client=client).submit(make_recipe(), "/out").id

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match=f"job {job} continues: rayfed-lora stop {job}"):
        Jobs(client=client).follow(job, interrupt)
    assert client.jobs[job].status == "PENDING"


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("succeeded", 0, 0),
        ("stopped", None, 130),
        ("failed", 2, 2),
        ("failed", 1, 1),
        ("failed", None, 1),
        ("failed", 0, 1),
    ],
)
def test_a_followed_job_has_the_exit_status_of_its_command(state, code, status) -> None:
    assert exit_status(JobView("a", "fake", state, exit_status=code)) == status


def test_progress_says_what_a_status_says() -> None:
    status = Status(
        phase="training",
        rounds_done=2,
        rounds=6,
        running=4,
        stage="heating",
        rank=None,
        training_since=10.0,
        loss=1.0,
    )
    # Three rounds took 20 s, of which two are finished: three more take 20.
    found = JobProgress.of(status, now=30.0)
    assert found.eta_s == pytest.approx(20.0)
    assert found.line() == "round 4/6 heating full model, train loss 1.000, ETA 0:20"
    assert JobProgress.read(found.model_dump_json()) == found


def test_an_address_is_a_dashboards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert dashboard_url("http://127.0.0.1:8265/") == "http://127.0.0.1:8265"
    assert dashboard_url("head:8265") == "http://head:8265"
    for wrong in (None, "auto", "ray://head:10001", "https://"):
        with pytest.raises(BadInputError, match="expected the address of a cluster's dashboard"):
            dashboard_url(wrong)
    assert not is_dashboard(None)
    assert not is_dashboard("127.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:1")
    assert is_dashboard(None)
    assert dashboard_url(None) == "http://head:1"
    assert dashboard_url("http://other:2") == "http://other:2"


def test_a_dashboard_that_nobody_answers_at_is_said_at_once() -> None:
    with pytest.raises(ResourceError, match=r"no Ray dashboard at http://127.0.0.1:1: .*refused"):
        Jobs("http://127.0.0.1:1")
    assert "refused" in str(unreachable_cluster("127.0.0.1:1"))
    for other in ("auto", "local", "ray://127.0.0.1:1", "http://127.0.0.1:1"):
        assert unreachable_cluster(other) is None


def test_a_refused_token_is_told_with_how_to_give_one_and_without_itself() -> None:
    from ray.exceptions import AuthenticationError

    with pytest.raises(ResourceError, match="RAY_AUTH_TOKEN_PATH"), translated_errors():
        raise AuthenticationError("Authentication failed: Forbidden. See the documents.")
    with pytest.raises(ResourceError, match="does not answer as expected"), translated_errors():
        raise ConnectionError("gone")
    with (
        pytest.raises(RunError, match="the cluster rejected the request: status code 500"),
        translated_errors("a"),
    ):
        raise RuntimeError("status code 500")


def test_rays_client_gets_the_address_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    seen = {}

    class Client:
        def __init__(self, address: str) -> None:
            seen[address] = os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS")

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    monkeypatch.setattr(dashboard, "unreachable", lambda host, port: None)
    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    dashboard.client_of("http://head:2")
    assert seen == {"http://head:2": ("http://head:2", None)}
    assert os.environ["RAY_ADDRESS"] == "http://other:1"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_what_a_job_tells_is_plain_json() -> None:
    found = json.loads(progress().model_dump_json())
    assert found["rounds_done"] == 6
