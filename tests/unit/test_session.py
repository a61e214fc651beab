"""A run from its folder to its summary: who may use the folder, going on, stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from rayfed_lora.errors import ClientError, InterruptedRunError, RunError, RunFolderError
from rayfed_lora.launching import launch
from rayfed_lora.launching.planning import plan
from rayfed_lora.lora.states import sha256
from rayfed_lora.pages.run_page import run_page
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs import checkpoints, seals
from rayfed_lora.runs.checksums import read_summary
from rayfed_lora.runs.claiming import claim
from rayfed_lora.runs.saving import PageWriter
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.storage import RunFolder
from tests.fakes import Behaviour, Killed, KilledEngine, every_round, local_engine, make_recipe

METROPOLIS: dict[str, Any] = {
    "annealing__acceptance": "metropolis",
    "annealing__temperature": 1e-5,
    "annealing__cooling__rounds": 4,
}
TARGET: dict[str, Any] = {
    "seed": 5,
    "annealing__acceptance": "target",
    "annealing__target__tolerance": 0.0,
    "annealing__cooling__rounds": 4,
}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fold and spectral": {
        "annealing__cooling__residual": "fold",
        "annealing__allocation": "spectral",
        "adapter__scaling": "rslora",
    },
    "product-svd": {"aggregation__rule": "product-svd", "annealing__initiating__trainable": "none"},
    "full model": {"annealing__mode": "full"},
    "metropolis": METROPOLIS,
    "target": TARGET,
    "stacking of mixed ranks": {
        "aggregation__rule": "stacking",
        "clients__ranks": {1: 0.5, 3: 0.5},
    },
    "residual": {"aggregation__rule": "residual"},
    "freeze-a and adam": {
        "aggregation__rule": "freeze-a",
        "aggregation__server_optimizer": {"name": "adam", "lr": 0.1},
    },
    "alternate and yogi": {
        "aggregation__rule": "alternate",
        "aggregation__server_optimizer": {"name": "yogi", "lr": 0.1},
    },
    "zero-pad of mixed ranks": {"aggregation__rule": "zero-pad", "clients__ranks": [1, 2, 3]},
    "share-a": {"method": "fedsa-lora"},
    "scaffold": {"method": "scaffold"},
    "feddyn": {"method": "feddyn"},
    "local-only": {"method": "local-only"},
    "scaffold of factors": {
        "clients__objective": "scaffold",
        "annealing__cooling__rank": 3,
    },
    "correct": {"aggregation__rule": "correct"},
    "error feedback": {
        "wire": {"up": {"name": "top-k", "share": 0.3, "error_feedback": True}},
        "clients__per_round": 5,
    },
    "the best one kept": {
        "evaluation__keep_best": "loss",
        "evaluation__early_stopping": {"metric": "accuracy", "patience": 5},
        "annealing__cooling__residual": "fold",
    },
    "the best one kept, own B": {
        "aggregation__rule": "share-a",
        "annealing__mode": "fixed",
        "evaluation__keep_best": "loss",
    },
    "momentum": {"aggregation__server_optimizer": {"name": "momentum", "lr": 0.5}},
    "head only": {"method": "head-only"},
    "a rank that rises": {
        "aggregation__rule": "freeze-a",
        "annealing__heating__shape": "ramp",
        "annealing__initiating__trainable": "adapter",
    },
    "share-a after a full stage": {
        "aggregation__rule": "share-a",
        "annealing__cooling__rank": 3,
    },
    "simulated devices": {
        "clients__availability": {"dropout": 0.3},
        "clients__speed": {"median": 2.0, "sigma": 0.5},
        "clients__over_select": 1.4,
        "network": {"up_mbps": 0.001, "down_mbps": 0.001, "latency_s": 0.1},
        "annealing__cooling__residual": "fold",
    },
    "tested on clients": {
        "method": "fedsa-lora",
        "evaluation__client_fraction": 0.5,
        "evaluation__clients": 4,
        "evaluation__clients_every": 2,
    },
}


def never() -> bool:
    return False


def run(
    recipe: Recipe,
    location: Path,
    *,
    engine: Any = None,
    page: PageWriter = run_page,
    resume: bool = False,
    should_stop: Callable[[], bool] = never,
    watch: Callable[[Status], None] | None = None,
) -> tuple[dict[str, Any], StatusBoard]:
    """Claim the folder and run, as the launcher does."""
    folder = RunFolder(location)
    claim(folder, recipe, resume)
    board = StatusBoard(recipe.annealing.total_rounds, watch)
    engine = engine or local_engine(recipe)
    return simulate(recipe, engine, folder, board, should_stop, resume=resume, page=page), board


def table(location: Path, name: str) -> pd.DataFrame:
    content = RunFolder(location).read(f"{name}.parquet")
    return pd.read_parquet(BytesIO(content)).drop(columns="seconds")


def assert_same_run(location: Path, expected: Path) -> None:
    """Compare all that must not depend on how often a run was interrupted."""
    for name in ("rounds", "clients"):
        pd.testing.assert_frame_equal(
            table(location, name), table(expected, name), check_exact=True
        )
    tested = "client_metrics.parquet"
    assert RunFolder(location).exists(tested) == RunFolder(expected).exists(tested)
    if RunFolder(expected).exists(tested):
        one, other = (pd.read_parquet(p / tested) for p in (location, expected))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    got, wanted = (json.loads(RunFolder(p).read("summary.json")) for p in (location, expected))
    for key in ("adapter_sha256", "communication", "final", "best", "rounds", "failed_clients"):
        assert got[key] == wanted[key]
    for key in ("kept", "stopped_by", "early_stopping"):
        assert got.get(key) == wanted.get(key)
    assert RunFolder(location).read("adapter/fake.json") == RunFolder(expected).read(
        "adapter/fake.json"
    )


# --- who may use a folder ---------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_folder_may_be_used_and_is_not_made_before_the_run_starts(tmp_path, resume):
    claim(RunFolder(tmp_path / "new"), make_recipe(), resume=resume)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_folder_may_be_used_and_stays_empty(tmp_path, resume):
    (tmp_path / "empty").mkdir()
    claim(RunFolder(tmp_path / "empty"), make_recipe(), resume=resume)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    run(make_recipe(), tmp_path)
    with pytest.raises(
        RunFolderError, match=r"holds a run already; `rayfed-lora run \S+ --resume` .*--out"
    ):
        claim(RunFolder(tmp_path), make_recipe(), resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_foreign_files_is_refused_and_left_as_it_is(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(RunFolderError, match="other files in it"):
        claim(RunFolder(tmp_path), make_recipe(), resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_another_recipe_is_refused_and_every_differing_key_is_listed(tmp_path):
    run(make_recipe(), tmp_path)
    other = make_recipe(
        seed=4,
        clients__per_round=2,
        annealing__cooling__shape="cubic",
        runtime__threads_per_actor=2,
    )
    with pytest.raises(RunFolderError) as refused:
        claim(RunFolder(tmp_path), other, resume=True)
    message = str(refused.value)
    assert message.endswith("differ: annealing.cooling.shape, clients.per_round, seed")


def test_where_a_run_happens_and_how_often_it_is_saved_may_change(tmp_path):
    run(make_recipe(), tmp_path)
    other = make_recipe(
        runtime__client_actors=2, runtime__executor="ray", storage__checkpoint_every=3
    )
    claim(RunFolder(tmp_path), other, resume=True)


@pytest.mark.parametrize(("key", "value"), [("cohort_size", 2), ("precision", "bf16")])
def test_what_changes_the_arithmetic_may_not_change_within_a_run(tmp_path, key, value):
    run(make_recipe(), tmp_path)
    with pytest.raises(RunFolderError, match=rf"differ: runtime\.{key}$"):
        claim(RunFolder(tmp_path), make_recipe(**{f"runtime__{key}": value}), resume=True)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"name: 3\n", b"", b"- a list\n"])
def test_a_recipe_that_cannot_be_read_is_a_run_folder_error(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"recipe\.yaml"):
        claim(RunFolder(tmp_path), make_recipe(), resume=True)


def test_a_killed_start_leaves_a_folder_that_can_be_started_again(tmp_path, monkeypatch):
    def killed(*args: Any) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr("rayfed_lora.runs.session.write_partition", killed)
        with pytest.raises(SystemExit):
            run(make_recipe(), tmp_path)
    claim(RunFolder(tmp_path), make_recipe(), resume=True)
    run(make_recipe(), tmp_path, resume=True)
    assert (tmp_path / "partition.parquet").exists()


def test_a_page_that_cannot_be_drawn_costs_no_result(tmp_path):
    def broken(*args: Any) -> str:
        raise ValueError("no ink")

    _, board = run(make_recipe(), tmp_path, page=broken)
    assert "no report.html (no ink)" in board.status().notes[-1]
    assert (tmp_path / "summary.json").exists()
    assert not (tmp_path / "report.html").exists()


def test_a_resumed_run_removes_what_killed_writes_have_left(tmp_path):
    run(make_recipe(), tmp_path)
    (tmp_path / "summary.json").unlink()
    scratch = [tmp_path / ".rounds.parquet.ab12cd_4.scratch", tmp_path / "checkpoints/.x.y.scratch"]
    for path in scratch:
        path.write_bytes(b"half")
    (tmp_path / ".mine").touch()
    run(make_recipe(), tmp_path, resume=True)
    assert not any(path.exists() for path in scratch)
    assert (tmp_path / ".mine").exists()


def test_a_page_that_cannot_be_written_costs_no_result(tmp_path):
    def in_the_way(*args: Any) -> str:
        (tmp_path / "report.html" / "x").mkdir(parents=True)
        return "<p>"

    _, board = run(make_recipe(), tmp_path, page=in_the_way)
    assert f"to make one: rayfed-lora report {tmp_path}" in board.status().notes[-1]
    assert (tmp_path / "summary.json").exists()


# --- a run without disturbance ------------------------------------------------------------------


def test_the_folder_holds_the_resolved_recipe_the_tables_and_the_export(tmp_path):
    recipe = make_recipe()
    run(recipe, tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert seals.text(RunFolder(tmp_path), "recipe.yaml") == recipe_yaml(recipe)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "recipe.yaml",
        "report.html",
        "rounds.parquet",
        "partition.parquet",
        "clients.parquet",
        "summary.json",
        "SHA256SUMS",
        "adapter/fake.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "checkpoints/base-000001.safetensors",
        *(
            f"checkpoints/round-00000{rounds}/{name}"
            for rounds in (5, 6)
            for name in ("manifest.json", "state.json", "state.safetensors")
        ),
    }


def test_the_summary_says_how_the_run_ended(tmp_path):
    recipe = make_recipe(name="a-run", seed=5)
    summary, board = run(recipe, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    rounds = table(tmp_path, "rounds")
    assert (summary["name"], summary["method"], summary["seed"]) == ("a-run", "sa-fedlora", 5)
    assert (summary["rounds"], summary["failed_clients"]) == (6, 0)
    last, best = rounds.iloc[-1], rounds.iloc[rounds["eval_accuracy"].argmax()]
    for row, key in ((last, "final"), (best, "best")):
        names = ("round", "eval_accuracy", "eval_loss", "eval_macro_f1", "train_loss")
        assert {name: summary[key][name] for name in names} == {name: row[name] for name in names}
        assert (summary[key]["eval_auc"], summary[key]["eval_perplexity"]) == (None, None)
    snapshot = checkpoints.newest(RunFolder(tmp_path), pytest.fail)
    assert snapshot is not None
    assert summary["adapter_sha256"] == sha256(snapshot.state, snapshot.base)
    assert board.status().phase == "done"


def test_the_summary_counts_every_byte_of_the_tables(tmp_path):
    summary, _ = run(make_recipe(clients__per_round=1.0), tmp_path)
    # Six clients. Round 0 is full: 47 values each way. Rounds 1 and 2 are of rank 3, 3 of rank 2, 4
    # and 5 of rank 1; 17 values a rank, 6 the head's. The base, 41 values, goes out once.
    adapter = 2 * (3 * 17 + 6) + (2 * 17 + 6) + 2 * (17 + 6)
    up = 6 * (47 + adapter) * 4
    fedavg = 6 * 2 * 6 * 47 * 4
    communication = summary["communication"]
    assert communication["bytes_up"] == communication["bytes_down"] == up
    assert communication["bytes_base"] == 6 * 41 * 4
    assert communication["total_bytes"] == 2 * up
    assert communication["fedavg_total_bytes"] == fedavg
    assert communication["reduction_vs_fedavg"] == pytest.approx(1 - 2 * up / fedavg)
    assert communication["reduction_vs_fedavg_after_initiating"] == pytest.approx(
        1 - adapter / (5 * 47)
    )
    rounds, clients = table(tmp_path, "rounds"), table(tmp_path, "clients")
    assert rounds["bytes_up"].sum() == clients["bytes_up"].sum() == up
    assert rounds["bytes_down"].sum() == clients["bytes_down"].sum() == up
    assert rounds["bytes_base"].tolist() == [0, 6 * 41 * 4, 0, 0, 0, 0]


def test_the_summary_has_times_and_versions(tmp_path):
    summary, _ = run(make_recipe(), tmp_path)
    timing = summary["timing"]
    assert set(timing) == {
        *("startup_s", "training_s", "evaluation_s", "wall_s", "client_updates_per_s")
    }
    parts = timing["startup_s"] + timing["training_s"] + timing["evaluation_s"]
    assert 0 < parts < timing["wall_s"]
    # Six rounds of three clients.
    assert timing["client_updates_per_s"] == pytest.approx(18 / timing["training_s"])
    assert {"python", "rayfed-lora", "ray", "torch", "numpy"} <= set(summary["versions"])
    assert summary["versions"]["numpy"] == np.__version__


def test_rounds_are_tested_as_often_as_asked_and_always_at_the_end(tmp_path):
    summary, _ = run(make_recipe(evaluation__every=4), tmp_path)
    tested = table(tmp_path, "rounds")["eval_loss"].notna()
    assert tested.tolist() == [False, False, False, True, False, True]
    assert summary["final"]["round"] == 5
    assert summary["best"]["round"] in (3, 5)


def test_the_schedule_reaches_the_tables(tmp_path):
    run(make_recipe(), tmp_path)
    rounds = table(tmp_path, "rounds")
    # Rank 3, then linearly to 1 in two rounds.
    assert rounds["stage"].tolist() == [
        *("initiating", "heating", "heating", "cooling", "cooling", "holding")
    ]
    assert rounds["rank"].tolist()[1:] == [3, 3, 2, 1, 1]
    assert math.isnan(rounds["rank"][0])
    assert rounds["ranks"][3] == {"q": 2, "v": 2}
    assert rounds["trainable_params"].tolist() == [47, 57, 57, 40, 23, 23]
    assert rounds["proximal_weight"].tolist() == [0.01, 0, 0, 0, 0, 0]


def test_clients_are_tested_on_their_own_examples_as_often_as_asked(tmp_path):
    summary, _ = run(make_recipe(**RECIPES["tested on clients"]), tmp_path)
    rows = pd.read_parquet(tmp_path / "client_metrics.parquet")
    assert rows.groupby("round").size().to_dict() == {1: 4, 3: 4, 5: 4}
    last = rows[rows["round"] == 5]
    # By the fake: |sin(energy + client)|, and the energy is the loss.
    expected = np.abs(np.sin(last["loss"] + last["client"]))
    np.testing.assert_allclose(last["accuracy"], expected)
    found = summary["clients"]
    assert found["tested"] == 4
    assert found["accuracy_mean"] == pytest.approx(last["accuracy"].mean())
    assert found["accuracy_std"] == pytest.approx(last["accuracy"].std(ddof=0))
    assert found["accuracy_min"] == found["accuracy_worst_tenth"] == last["accuracy"].min()
    # Clients that have taken part have a model of their own.
    seen = set(table(tmp_path, "clients")["client"])
    assert set(last["client"][last["personal_accuracy"].notna()]) == seen & set(last["client"])
    own = last.dropna()
    assert not np.allclose(own["personal_loss"], own["loss"])
    assert found["personal_accuracy_mean"] == pytest.approx(own["personal_accuracy"].mean())


def test_without_held_out_examples_no_client_is_tested(tmp_path):
    summary, _ = run(make_recipe(), tmp_path)
    assert not (tmp_path / "client_metrics.parquet").exists()
    assert "clients" not in summary


def test_all_clients_are_tested_after_the_last_round_where_nothing_else_is_said(tmp_path):
    run(make_recipe(evaluation__client_fraction=0.2), tmp_path)
    rows = pd.read_parquet(tmp_path / "client_metrics.parquet")
    assert rows["round"].tolist() == 6 * [5]
    assert rows["client"].tolist() == list(range(6))
    assert rows["personal_accuracy"].isna().all()


# --- going on ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of an undisturbed run of one of `RECIPES`, run once."""
    done: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("undisturbed")
            run(make_recipe(**RECIPES[name]), done[name])
        return done[name]

    return folder


@pytest.mark.parametrize("t", range(6))
def test_a_run_killed_in_any_round_goes_on_to_the_same_bits(t, undisturbed, tmp_path):
    killed = KilledEngine(make_recipe(), round_index=t, position=1)
    with pytest.raises(Killed):
        run(make_recipe(), tmp_path, engine=killed)
    assert killed.closed
    _, board = run(make_recipe(), tmp_path, resume=True)
    assert board.status().rounds_before == t
    assert_same_run(tmp_path, undisturbed("plain"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_killed_in_every_round_goes_on_to_the_same_bits(name, undisturbed, tmp_path):
    recipe = make_recipe(**RECIPES[name])
    for t in range(recipe.annealing.total_rounds):
        for position in (0, 2):
            engine = KilledEngine(recipe, t, position)
            with pytest.raises(Killed):
                run(recipe, tmp_path, engine=engine, resume=True)
    run(recipe, tmp_path, resume=True)
    assert_same_run(tmp_path, undisturbed(name))


class Watched(KilledEngine):
    """Writes down what is submitted, in order."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, -1, 0)
        self.seen: list[str] = []

    def submit(self, task: Any) -> Any:
        self.seen.append(task.kind)
        return super().submit(task)


def test_a_round_is_trained_and_then_tested(tmp_path):
    engine = Watched(make_recipe())
    run(make_recipe(), tmp_path, engine=engine)
    rounds = [kind for _ in range(6) for kind in ("train", "evaluate test")]
    assert engine.seen == ["initial tensors", *rounds, "export"]


def test_the_feedback_recipes_do_meet_proposals_of_both_kinds(undisturbed):
    # Else the two tests of going on above would say nothing of feedback.
    for name, verdicts in (
        ("metropolis", {"accepted", "rejected"}),
        ("target", {"accepted", "reheated"}),
    ):
        rounds = table(undisturbed(name), "rounds")
        assert set(rounds["verdict"].dropna()) == verdicts


@pytest.mark.parametrize("killed_in", [2, 3, 4, 5])
def test_a_run_saved_every_third_round_goes_on_from_the_last_save(killed_in, undisturbed, tmp_path):
    recipe = make_recipe(storage__checkpoint_every=3)
    with pytest.raises(Killed):
        run(recipe, tmp_path, engine=KilledEngine(recipe, killed_in, 0))
    _, board = run(recipe, tmp_path, resume=True)
    assert board.status().rounds_before == (0 if killed_in < 3 else 3)
    assert_same_run(tmp_path, undisturbed("plain"))


def test_a_kill_while_a_round_is_recorded_loses_nothing(undisturbed, tmp_path):
    recipe = make_recipe()

    def die_after_round_3(status: Status) -> None:
        if status.records and status.records[-1].round == 3:
            raise Killed

    with pytest.raises(Killed):
        run(recipe, tmp_path, watch=die_after_round_3)
    _, board = run(recipe, tmp_path, resume=True)
    assert board.status().rounds_before == 3
    assert_same_run(tmp_path, undisturbed("plain"))


@pytest.mark.parametrize("file", ["rounds.parquet", "clients.parquet", "state.safetensors"])
def test_a_kill_between_two_writes_of_a_save_loses_nothing(
    file, undisturbed, tmp_path, monkeypatch
):
    recipe = make_recipe()
    opened, seen = RunFolder.open_to_write, []

    def killed_before_the_fourth(self: RunFolder, name: str) -> AbstractContextManager[IO[bytes]]:
        seen.append(name.endswith(file))
        if seen[-1] and sum(seen) == 4:
            raise Killed
        return opened(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "open_to_write", killed_before_the_fourth)
        with pytest.raises(Killed):
            run(recipe, tmp_path)
    _, board = run(recipe, tmp_path, resume=True)
    assert board.status().rounds_before == 3
    assert_same_run(tmp_path, undisturbed("plain"))


def test_notes_of_a_start_that_never_came_to_a_checkpoint_go(tmp_path):
    recipe = make_recipe()
    with pytest.raises(Killed):
        run(recipe, tmp_path, engine=KilledEngine(recipe, 0, 0))
    (tmp_path / "notes.parquet").write_bytes(b"of a killed start")
    run(recipe, tmp_path, resume=True)
    assert not (tmp_path / "notes.parquet").exists()


def test_a_run_killed_while_it_exports_needs_no_round_again(undisturbed, tmp_path):
    recipe = make_recipe()

    def die_exporting(status: Status) -> None:
        if status.phase == "exporting":
            raise Killed

    with pytest.raises(Killed):
        run(recipe, tmp_path, watch=die_exporting)
    assert read_summary(RunFolder(tmp_path)) is None
    _, board = run(recipe, tmp_path, resume=True)
    assert (board.status().rounds_before, board.status().updates) == (6, 0)
    assert_same_run(tmp_path, undisturbed("plain"))


def test_no_checkpoint_is_written_twice(tmp_path, monkeypatch):
    written = []
    write = checkpoints.CheckpointWriter.write
    monkeypatch.setattr(
        checkpoints.CheckpointWriter,
        "write",
        lambda itself, snapshot: (written.append(snapshot.rounds), write(itself, snapshot)),
    )
    run(make_recipe(storage__checkpoint_every=4), tmp_path)
    assert written == [4, 6]
    (tmp_path / "summary.json").unlink()
    run(make_recipe(storage__checkpoint_every=4), tmp_path, resume=True)
    assert written == [4, 6]


def test_a_damaged_newest_checkpoint_is_told_and_the_result_is_the_same(undisturbed, tmp_path):
    recipe = make_recipe()
    with pytest.raises(Killed):
        run(recipe, tmp_path, engine=KilledEngine(recipe, 4, 0))
    file = tmp_path / "checkpoints" / "round-000004" / "state.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    _, board = run(recipe, tmp_path, resume=True)
    (note,) = board.status().notes
    assert "round-000004 is damaged" in note
    assert board.status().rounds_before == 3
    assert_same_run(tmp_path, undisturbed("plain"))


def test_going_on_with_a_finished_run_returns_its_summary_and_starts_nothing(tmp_path):
    recipe = make_recipe()
    summary, _ = run(recipe, tmp_path)
    before = (tmp_path / "summary.json").stat().st_mtime_ns
    # Every client would fail: nothing is trained.
    engine = local_engine(recipe, Behaviour(failing=frozenset({(0, 0), (1, 0), (2, 0)})))
    again, board = run(recipe, tmp_path, engine=engine, resume=True)
    assert again == summary
    assert board.status() == Status(rounds=6)
    assert (tmp_path / "summary.json").stat().st_mtime_ns == before


def test_times_add_up_over_sessions(tmp_path):
    recipe = make_recipe()
    slow = local_engine(recipe, Behaviour(sleep_s=dict.fromkeys(range(6), 0.05)))
    stop = StopAfter(updates=7)
    with pytest.raises(InterruptedRunError):
        run(recipe, tmp_path, engine=slow, should_stop=stop)
    summary, _ = run(recipe, tmp_path, resume=True)
    # Two rounds of three clients of 0.05 s in the first session.
    assert summary["timing"]["training_s"] >= 6 * 0.05
    assert summary["timing"]["wall_s"] >= summary["timing"]["training_s"]
    rate = 18 / summary["timing"]["training_s"]
    assert summary["timing"]["client_updates_per_s"] == pytest.approx(rate)


# --- stopping and failing ------------------------------------------------------------------------


class StopAfter:
    """Says stop once it has been asked more than `updates` times; asked once an update."""

    def __init__(self, updates: int) -> None:
        self._left = updates

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(("updates", "rounds"), [(0, 0), (3, 1), (7, 2), (17, 5)])
def test_a_stopped_run_keeps_its_trained_rounds_and_goes_on_to_the_same_bits(
    updates, rounds, undisturbed, tmp_path
):
    # Rounds are saved every fourth time only, but a stop saves what is finished.
    recipe = make_recipe(storage__checkpoint_every=4)
    engine = local_engine(recipe)
    with pytest.raises(InterruptedRunError) as stopped:
        run(recipe, tmp_path, engine=engine, should_stop=StopAfter(updates))
    kept = f"stopped with {rounds} of 6 rounds done, kept in {tmp_path}; --resume continues"
    assert str(stopped.value) == kept
    assert stopped.value.exit_status == 130
    assert read_summary(RunFolder(tmp_path)) is None
    _, board = run(recipe, tmp_path, resume=True)
    assert board.status().rounds_before == rounds
    assert_same_run(tmp_path, undisturbed("plain"))


def test_a_client_that_raises_ends_the_run_and_the_rounds_before_are_kept(tmp_path):
    recipe = make_recipe(clients__per_round=1.0)
    broken = local_engine(recipe, Behaviour(raising=frozenset({(4, 3)})))
    with pytest.raises(ClientError, match=r"client 4 failed in round 4:\n"):
        run(recipe, tmp_path, engine=broken)
    _, board = run(recipe, tmp_path, resume=True)
    assert board.status().rounds_before == 3


def test_a_run_goes_on_without_as_many_raising_clients_as_it_may(tmp_path):
    recipe = make_recipe(clients__per_round=1.0, clients__max_failed=0.2)
    broken = local_engine(recipe, Behaviour(raising=frozenset({(4, 1), (4, 3)})))
    summary, board = run(recipe, tmp_path, engine=broken)
    assert summary["failed_clients"] == 2
    rounds, clients = table(tmp_path, "rounds"), table(tmp_path, "clients")
    assert rounds["failed_clients"].tolist() == [0, 1, 0, 1, 0, 0]
    failed = clients[clients["status"] == "failed"]
    # Client k holds k + 1 examples.
    assert failed[["round", "client", "examples"]].to_numpy().tolist() == [[1, 4, 5], [3, 4, 5]]
    assert set(failed["error"]) == {"ValueError: the fake client 4 was told to raise"}
    notes = board.status().notes
    failure = "client 4 failed: ValueError: the fake client 4 was told to raise"
    assert notes.count(failure) == 2
    kept = pd.read_parquet(tmp_path / "notes.parquet")
    assert kept.to_numpy().tolist() == [[1, failure], [3, failure]]


def test_more_raising_clients_than_may_end_the_run_with_the_last_ones_traceback(tmp_path):
    recipe = make_recipe(clients__per_round=1.0, clients__max_failed=1)
    broken = local_engine(recipe, Behaviour(raising=frozenset({(2, 3), (4, 3), (5, 3)})))
    with pytest.raises(ClientError, match=r"client 4 failed in round 4:\n") as raised:
        run(recipe, tmp_path, engine=broken)
    assert "_train_client" in raised.value.trace
    assert str(raised.value).endswith("2 clients of the round failed, clients.max_failed allows 1")
    _, board = run(recipe, tmp_path, resume=True)
    assert board.status().rounds_before == 3


@pytest.mark.parametrize("together", [1, 2, 3])
def test_a_block_that_does_not_fit_into_memory_is_halved_and_that_is_said(
    together, undisturbed, tmp_path
):
    recipe = make_recipe(clients__per_round=5, runtime__cohort_size=5)
    expected, _ = run(recipe, tmp_path / "expected")
    short = local_engine(recipe, Behaviour(together=together))
    summary, board = run(recipe, tmp_path / "short", engine=short)
    assert summary["adapter_sha256"] == expected["adapter_sha256"]
    notes = board.status().notes
    assert "5 clients do not fit; trained in halves" in " ".join(notes)


def test_a_client_that_does_not_fit_into_memory_alone_ends_the_run(tmp_path):
    recipe = make_recipe(clients__per_round=5)
    with pytest.raises(ClientError, match="1 clients do not fit"):
        run(recipe, tmp_path, engine=local_engine(recipe, Behaviour(together=0)))


def test_a_disk_that_fills_up_ends_the_run_and_the_rounds_before_are_kept(
    undisturbed, tmp_path, monkeypatch
):
    recipe = make_recipe()
    write = RunFolder.write

    def full(self: RunFolder, name: str, content: bytes) -> None:
        if "round-000003" in name:
            raise RunError(f"cannot write {name}: No space left on device")
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", full)
        with pytest.raises(RunError, match="No space left on device"):
            run(recipe, tmp_path)
    _, board = run(recipe, tmp_path, resume=True)
    assert board.status().rounds_before == 2
    assert_same_run(tmp_path, undisturbed("plain"))


def test_an_executor_that_cannot_open_is_closed_and_the_run_can_start_again(tmp_path):
    recipe = make_recipe()

    class Unopenable(KilledEngine):
        def open(self) -> Any:
            raise RunError("no data")

        def close(self) -> None:
            # The next owner may need what the engine holds.
            owned.append([*tmp_path.glob(".owner-*.json")])
            super().close()

    owned: list[list[Path]] = []
    engine = Unopenable(recipe, 0, 0)
    with pytest.raises(RunError, match="no data"):
        run(recipe, tmp_path, engine=engine)
    assert engine.closed
    assert owned[0]
    assert not [*tmp_path.glob(".owner-*.json")]
    summary, _ = run(recipe, tmp_path, resume=True)
    assert summary["rounds"] == 6


def test_who_is_late_is_not_trained_and_stands_in_the_tables(tmp_path):
    # Client k holds k + 1 examples and trains them in k + 1 seconds.
    recipe = make_recipe(
        clients__per_round=1.0,
        clients__local_epochs=1,
        clients__speed=1.0,
        clients__deadline_s=4.5,
        annealing__mode="fixed",
    )
    # Clients 4 and 5 would kill the process if they were trained.
    lethal = local_engine(recipe, Behaviour(dying_always=every_round(4, 5)))
    summary, board = run(recipe, tmp_path, engine=lethal)
    rounds, clients = table(tmp_path, "rounds"), table(tmp_path, "clients")
    assert rounds["dropped_clients"].tolist() == [2] * 6
    assert rounds["clients"].tolist() == [6] * 6
    assert rounds["simulated_s"].tolist() == [4.5] * 6
    assert summary["simulation"]["total_s"] == 27.0
    assert summary["simulation"]["dropped_clients"] == 12
    late = clients[clients["status"] == "late"]
    assert sorted(set(late["client"])) == [4, 5]
    assert set(late["examples"]) == {5, 6}
    assert late["train_loss"].isna().all()
    assert (late["bytes_up"] == 0).all()
    assert set(late["simulated_s"]) == {4.5}
    assert board.status().clients_done == 6


def test_a_round_in_which_nobody_arrives_leaves_the_model_as_it_is(tmp_path):
    recipe = make_recipe(annealing__mode="fixed", clients__speed=1.0, clients__deadline_s=1e-3)
    run(recipe, tmp_path)
    rounds = table(tmp_path, "rounds")
    assert rounds["dropped_clients"].tolist() == [3] * 6
    assert rounds["train_loss"].isna().all()
    assert rounds["bytes_up"].sum() == 0
    assert rounds["eval_loss"].nunique() == 1
    summary = read_summary(RunFolder(tmp_path))
    assert summary is not None
    assert summary["final"]["train_loss"] is None


def test_a_plan_foretells_the_simulated_clock(tmp_path):
    recipe = load_recipe(
        "digits-vit",
        {
            "data.max_examples": 200,
            "clients.speed": {"median": 50.0, "sigma": 0.5},
            "clients.availability": 0.2,
            "network": {"up_mbps": 1.0, "down_mbps": 4.0},
            "annealing.initiating.rounds": 1,
            "annealing.heating.rounds": 1,
            "annealing.cooling.rounds": 2,
            "annealing.holding.rounds": 0,
            "runtime.executor": "local",
        },
    )
    planned = plan(recipe)
    result = launch.run(recipe, str(tmp_path / "run"))
    rounds = result.rounds
    assert [r.simulated_s for r in planned.rounds] == rounds["simulated_s"].tolist()
    assert [r.arriving for r in planned.rounds] == (
        rounds["clients"] - rounds["dropped_clients"]
    ).tolist()
    assert [r.bytes_up for r in planned.rounds] == rounds["bytes_up"].tolist()
    assert rounds["dropped_clients"].sum() > 0


def test_tables_of_another_order_of_columns_or_without_a_new_one_go_on(undisturbed, tmp_path):
    with pytest.raises(InterruptedRunError):
        run(make_recipe(), tmp_path, should_stop=StopAfter(7))
    folder = RunFolder(tmp_path)
    table = pq.read_table(BytesIO(folder.read("rounds.parquet")))
    names = [name for name in reversed(table.column_names) if name != "eval_perplexity"]
    seals.write_table(folder, "rounds.parquet", table.select(names))
    run(make_recipe(), tmp_path, resume=True)
    found = pd.read_parquet(tmp_path / "rounds.parquet")
    expected = pd.read_parquet(undisturbed("plain") / "rounds.parquet")
    assert list(found) == list(expected)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))


def test_a_rejected_resume_leaves_a_finished_runs_summary(tmp_path):
    run(make_recipe(), tmp_path)
    (tmp_path / "adapter" / "fake.json").unlink()
    content = (tmp_path / "rounds.parquet").read_bytes()
    (tmp_path / "rounds.parquet").write_bytes(content[:-40] + bytes(40))
    with pytest.raises(RunFolderError, match=r"rounds\.parquet"):
        run(make_recipe(), tmp_path, resume=True)
    assert (tmp_path / "summary.json").exists() and (tmp_path / "SHA256SUMS").exists()


@pytest.mark.parametrize(("written", "said"), [(None, None), (2, "format 1, got 2: another")])
def test_an_older_run_folder_is_read_and_a_newer_one_is_refused(written, said, tmp_path):
    run(make_recipe(), tmp_path)
    folder = RunFolder(tmp_path)
    summary = json.loads(folder.read("summary.json"))
    assert summary.pop("format") == 1
    if written is not None:
        summary["format"] = written
    # As before there were checksums of folders, and versions of recipes.
    folder.remove("SHA256SUMS")
    del summary["checksums"]
    folder.write("summary.json", json.dumps(summary).encode())
    if said is None:
        assert read_summary(folder) == summary
    else:
        with pytest.raises(RunFolderError, match=said):
            read_summary(folder)


def test_a_recipe_of_before_there_were_versions_is_resumed(tmp_path):
    recipe = make_recipe()
    with pytest.raises(Killed):
        run(recipe, tmp_path, engine=KilledEngine(recipe, 3, 0))
    folder = RunFolder(tmp_path)
    old = [
        line
        for line in folder.read("recipe.yaml").decode().splitlines()[1:]
        if not line.startswith(("version:", "plugins:", "privacy:"))
    ]
    folder.write("recipe.yaml", "\n".join(old).encode())
    summary, _ = run(recipe, tmp_path, resume=True)
    assert summary["rounds"] == 6
