"""A finished run under lm-evaluation-harness. Source: this project."""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayfed_lora.errors import BadInputError, RunError, RunFolderError
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.runtime import Harness
from rayfed_lora.runs.claiming import kept_recipe, say
from rayfed_lora.runs.reading import task_of
from rayfed_lora.storage import RunFolder

HARNESS_FILE = "harness.json"


def check_recipes(recipes: Iterable[Recipe]) -> None:
    """Raise BadInputError where `evaluation.harness` of a recipe could not be computed here.

    The harness is not installed, or does not know a task. Its data sets are read at the end only.
    """
    checked: list[Harness] = []
    for recipe in recipes:
        asked = recipe.evaluation.harness
        if asked.tasks and asked not in checked:
            _tasks(asked, "evaluation.harness.")
            checked.append(asked)


def refuse(recipe: Recipe, what: str) -> None:
    """Raise BadInputError where a recipe has tasks of the harness, which `what` does not test."""
    if recipe.evaluation.harness.tasks:
        raise BadInputError(
            f"evaluation.harness.tasks: expected none with {what}, which tests no model on tasks of"
            " lm-evaluation-harness; leave them out, and use `rayfed-lora evaluate DIR --tasks ...`"
            " on a finished run"
        )


def has_results(folder: RunFolder) -> bool:
    """Whether a run's folder has results of the harness."""
    return folder.exists(HARNESS_FILE)


def kept(folder: RunFolder) -> dict[str, Any]:
    """Return the results in a run's folder, metrics by task; empty where there are none.

    Raises:
        RunFolderError: the file is damaged.
    """
    if not has_results(folder):
        return {}
    try:
        found = json.loads(folder.read(HARNESS_FILE))
    except ValueError as error:
        raise RunFolderError(f"{folder.location}: {HARNESS_FILE} cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise RunFolderError(f"{folder.location}: {HARNESS_FILE}: expected metrics by task")
    return found


def test(recipe: Recipe, location: str) -> None:
    """Test a finished run on the tasks of its `evaluation.harness`, unless that was done before.

    Raises:
        RunError: the harness failed; the run is finished all the same.
    """
    asked = recipe.evaluation.harness
    if not asked.tasks or has_results(RunFolder(location)):
        return
    try:
        _evaluated(location, asked, "evaluation.harness.")
    except BadInputError as error:
        again = f"rayfed-lora run --resume {shlex.quote(location)}"
        raise RunError(
            f"the run is finished, but not its evaluation.harness: {error}; to try again: {again}"
        ) from error


def evaluate_run(
    location: str,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Test the exported model of a run on tasks of lm-evaluation-harness; write harness.json.

    Results of tasks that the file has already are replaced, others stay.

    Args:
        location: of the run's folder.
        tasks: names of tasks or groups.
        include: a folder with tasks of one's own (YAML).
        limit: most examples of a task; None: all.
        few_shot: examples in the prompt; None: as each task says.
        chat_template: ask prompts as a user's turns, in the template that the run was trained with.
        batch_size: examples in a forward pass.

    Returns:
        Metrics by task.

    Raises:
        BadInputError: the folder holds no finished run of a language model, the harness is not
            installed, or a task is not known or cannot be computed.
    """
    if not tasks:
        raise BadInputError("--tasks: expected one task or more, got none")
    asked = Harness(
        tasks=[*tasks],
        include=None if include is None else str(include),
        limit=limit,
        few_shot=few_shot,
        chat_template=chat_template,
        batch_size=batch_size,
    )
    return _evaluated(location, asked, "--")


def _evaluated(location: str, asked: Harness, option: str) -> dict[str, Any]:
    folder = RunFolder(location)
    if folder.exists("recipe.yaml") and (task := task_of(folder)) != "causal-lm":
        raise BadInputError(
            f"{location}: expected a run of a language model (model.task causal-lm), got {task}"
        )
    manager, before = _tasks(asked, option), kept(folder)
    with TemporaryDirectory() as scratch:
        to = Path(scratch, "model")
        for _ in export_run(location, to, merge=True):
            pass
        _check_template(to, asked.chat_template, option)
        # Here: it imports torch and transformers.
        from rayfed_lora.models import harness

        recipe = kept_recipe(folder, model_only=True)
        device = "auto" if recipe is None else recipe.runtime.device
        found = harness.scores(to, manager, asked, device)
    facts = asked.model_dump(include={"limit", "few_shot", "chat_template"})
    new = {name: {**values, **facts} for name, values in found.items()}
    folder.write(HARNESS_FILE, json.dumps({**before, **new}, indent=1).encode())
    return found


def _tasks(asked: Harness, option: str) -> Any:
    """Return the harness's `TaskManager`; raise BadInputError where it does not know a task."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInputError(
            f"{option}tasks: needs lm-evaluation-harness, pip install 'rayfed-lora[harness]'"
        )
    if asked.include is not None and not Path(asked.include).expanduser().is_dir():
        raise BadInputError(f"{option}include: expected a folder, got {asked.include}")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    include = None if asked.include is None else str(Path(asked.include).expanduser())
    manager = TaskManager(include_path=include)
    known = {*manager.all_tasks}
    unknown = [task for task in asked.tasks if task not in known]
    if unknown:
        raise BadInputError(
            f"{option}tasks: expected tasks of lm-evaluation-harness, or of the folder of"
            f" {option}include, got {', '.join(unknown)}"
        )
    return manager


def _check_template(model: Path, asked: bool, option: str) -> None:
    """Raise BadInputError for a template that is not there; tell of one that is not asked for."""
    there = (model / "chat_template.jinja").is_file()
    name = "--chat-template" if option == "--" else f"{option}chat_template"
    if asked and not there:
        raise BadInputError(f"{name}: expected a tokenizer with a chat template, it has none")
    if there and not asked:
        say(f"prompts are plain text, though the model has a chat template: see {name}")
