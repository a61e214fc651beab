"""A run is continued by naming its folder; a folder that is not there is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rayfed_lora
from rayfed_lora.errors import BadInputError, RecipeError, RunFolderError
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.runs.resuming import recipe_and_place
from tests.fakes import RECIPE, FakeFactory, make_recipe


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `runs/first` of a finished run, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    rayfed_lora.run(make_recipe(), "runs/first", factory=FakeFactory())
    return tmp_path / "runs" / "first"


def resumed(source: Any, out: str | None = None, *settings: str) -> Any:
    return recipe_and_place(source, out, True, settings)


@pytest.mark.parametrize("as_path", [False, True])
def test_the_folder_of_a_run_stands_for_its_recipe_and_its_place(done: Path, as_path: bool) -> None:
    recipe, place = resumed(done if as_path else "runs/first")
    assert recipe == make_recipe()
    assert Path(place).resolve() == done
    # The same folder, named twice, is no fault.
    assert Path(resumed("runs/first", str(done))[1]).resolve() == done


def test_a_run_goes_on_from_python_by_its_folder_alone(done: Path) -> None:
    (done / "summary.json").unlink()
    again = rayfed_lora.run("runs/first", resume=True, factory=FakeFactory())
    assert again.location == "runs/first"
    assert again.summary["rounds"] == make_recipe().annealing.total_rounds


def test_settings_may_change_what_a_resumed_run_may_change(done: Path) -> None:
    recipe, _ = resumed("runs/first", None, "storage.keep=7")
    assert recipe.storage.keep == 7
    assert rayfed_lora.run(recipe, "runs/first", resume=True).summary["rounds"] > 0
    other, _ = resumed("runs/first", None, "seed=99")
    with pytest.raises(RunFolderError, match="another recipe; these keys differ: seed"):
        rayfed_lora.run(other, "runs/first", resume=True)


@pytest.mark.usefixtures("done")
@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("runs/frist", None, r"there is no folder 'runs/frist' \(did you mean 'runs/first'\?\)"),
        ("runs/zzz", None, r"there is no folder 'runs/zzz'$"),
        ("runs", None, r"'runs' holds no run"),
        (RECIPE, "runs/frist", r"no folder 'runs/frist' \(did you mean 'runs/first'\?\)"),
        (RECIPE, "run", r"no folder 'run' \(did you mean 'runs'\?\)"),
    ],
)
def test_a_folder_that_is_not_there_is_named_with_the_nearest_one(
    source: Any, out: str | None, message: str
) -> None:
    with pytest.raises(RunFolderError, match=message):
        resumed(source, out)


def test_a_missing_search_is_named_with_the_nearest_one(done: Path) -> None:
    with pytest.raises(RunFolderError, match=r"did you mean '\S+/runs/first'"):
        rayfed_lora.tune("quick", "digits-vit", "runs/frist", resume=True)
    assert [path.name for path in (done.parent).iterdir()] == ["first"]


def test_the_command_of_a_job_may_begin_the_run_that_it_resumes(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cluster repeats the same command, and a job may end before its run has begun.
    job = '{"metadata": {"job_submission_id": "job-1"}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    assert resumed(RECIPE, f"{done.parent}/new")[1] == f"{done.parent}/new"


@pytest.mark.usefixtures("done")
def test_another_folder_beside_a_run_folder_is_rejected() -> None:
    with pytest.raises(BadInputError, match=r"--out: expected none .* got 'runs/other'"):
        resumed("runs/first", "runs/other")


@pytest.mark.usefixtures("done")
def test_a_run_folder_without_resume_says_what_can_be_done_with_it() -> None:
    with pytest.raises(BadInputError) as rejected:
        recipe_and_place("runs/first", None, False)
    assert "`rayfed-lora run runs/first --resume` continues it" in str(rejected.value)
    assert "`rayfed-lora run runs/first/recipe.yaml` runs its recipe" in str(rejected.value)
    with pytest.raises(RecipeError, match=r"did you mean 'runs/first/recipe\.yaml'"):
        load_recipe("runs/first")


@pytest.mark.usefixtures("done")
def test_a_misspelt_recipe_file_is_answered_with_the_nearest_one() -> None:
    Path("mine.yaml").write_text(recipe_yaml(make_recipe()))
    with pytest.raises(RecipeError, match=r"did you mean 'mine\.yaml'"):
        load_recipe("mien.yaml")


def test_resume_without_a_folder_is_rejected() -> None:
    with pytest.raises(BadInputError, match="give the folder of the run"):
        resumed(RECIPE)
