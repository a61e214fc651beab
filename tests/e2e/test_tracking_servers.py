"""W&B and MLflow as they are, without a server: offline files and a local database."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from rayfed_lora.errors import InterruptedRunError, RunError
from tests.fakes import make_recipe
from tests.unit.test_tracking import run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def in_two_sessions(location: Path, key: str, value: str) -> pd.DataFrame:
    recipe = make_recipe(**{f"tracking__{key}": value})
    with pytest.raises(InterruptedRunError):
        run(recipe, location, stop_after=3)
    board = run(recipe, location)
    assert board.status().notes == ()
    return pd.read_parquet(location / "rounds.parquet")


def test_mlflow_has_each_round_once_and_the_recipe(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="a local database of MLflow needs it")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(None)
    rounds = in_two_sessions(tmp_path / "run", "mlflow", "digits")
    client = mlflow.MlflowClient()
    (kept,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (kept.info.run_name, kept.info.status) == ("run", "FINISHED")
    assert kept.data.params["annealing.heating.rank"] == "3"
    assert not any(key.startswith("storage") for key in kept.data.params)
    for name in ("train_loss", "eval_loss", "bytes_up", "rank"):
        wanted = rounds[["round", name]].dropna()
        found = client.get_metric_history(kept.info.run_id, name)
        assert [metric.step for metric in found] == wanted["round"].tolist(), name
        assert [metric.value for metric in found] == wanted[name].tolist(), name


def test_wandb_keeps_one_run_over_sessions_and_its_files_in_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    in_two_sessions(tmp_path / "run", "wandb", "digits")
    known = json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]
    # A file a session, of the same run; `wandb sync` sends both.
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known}"))) == 2


def test_a_run_that_mlflow_cannot_take_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unknown://nowhere")
    with pytest.raises(RunError, match=r"tracking\.mlflow: "):
        run(make_recipe(tracking__mlflow="digits"), tmp_path)
