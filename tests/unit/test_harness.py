"""Language models under lm-evaluation-harness (`rayfed-lora evaluate`, `evaluation.harness`)."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rayfed_lora
from rayfed_lora.cli.run_display import harness_rows
from rayfed_lora.errors import BadInputError, RecipeError, RunError, RunFolderError
from rayfed_lora.launching.harness import evaluate_run, refuse
from rayfed_lora.runs.location import with_absolute_paths
from tests.chats import character_tokenizer, chat_recipe, short_tasks, write_formats
from tests.fakes import FakeFactory, make_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness"
)
QUESTIONS = [("the sky is", ["blue", "green"], 0), ("grass is", ["red", "green"], 1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_formats(folder, short_tasks())
    character_tokenizer().save_pretrained(str(folder / "tokenizer"))
    rayfed_lora.run(chat_recipe(folder), str(folder / "run"))
    return folder / "run"


def own_tasks(folder: Path) -> Path:
    """A task of two questions with two choices each, and the folder that it is in."""
    rows = [{"q": q, "choices": choices, "gold": gold} for q, choices, gold in QUESTIONS]
    data = folder / "rows.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "colours.yaml").write_text(
        f"""
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
    )
    return folder


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
@needs_harness
def test_a_local_task_has_the_accuracy_of_the_likelier_choices(run: Path, tmp_path: Path) -> None:
    tasks = own_tasks(tmp_path)
    found = evaluate_run(str(run), ["colours"], include=tasks)
    net, tokenizer = rayfed_lora.Result.open(run).model(), character_tokenizer()
    right = 0
    for question, choices, gold in QUESTIONS:
        scores = []
        for choice in choices:
            prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = net(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
            scores.append(
                sum(float(logits[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            )
        right += scores.index(max(scores)) == gold
    assert found["colours"]["acc"] == right / len(QUESTIONS)
    kept = json.loads((run / "harness.json").read_text())
    assert kept["colours"]["acc"] == found["colours"]["acc"]
    # The folder is still whole.
    assert rayfed_lora.Result.open(run).summary["rounds"] == 1
    with pytest.raises(BadInputError, match="got no_such_task"):
        evaluate_run(str(run), ["colours", "no_such_task"], include=tasks)


def fake(monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]) -> list[Any]:
    """Replace the harness by one that knows the tasks a and b; return what it is asked for."""
    from rayfed_lora.models import harness as of_models

    asked: list[Any] = []

    def scores(folder: Path, manager: Any, options: Any, device: str) -> dict[str, Any]:
        assert (folder / "model.safetensors").is_file()
        assert (folder / "tokenizer.json").is_file()
        asked.append((options, device, manager.include_path))
        return {task: results[task] for task in options.tasks}

    class TaskManager:
        all_tasks = ("a", "b")

        def __init__(self, include_path: str | None) -> None:
            self.include_path = include_path

    for name in ("lm_eval", "lm_eval.tasks"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["lm_eval.tasks"])["TaskManager"] = TaskManager
    monkeypatch.setattr(of_models, "scores", scores)
    return asked


def without_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_results_are_kept_beside_those_of_other_tasks(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "harness.json").unlink(missing_ok=True)
    asked = fake(monkeypatch, {"a": {"acc": 0.5}, "b": {"acc": 0.25}})
    found = evaluate_run(str(run), ["a"], limit=3, few_shot=1, chat_template=True)
    assert found == {"a": {"acc": 0.5}}
    evaluate_run(str(run), ["b"], include=run.parent)
    expected = {
        "a": {"acc": 0.5, "limit": 3, "few_shot": 1, "chat_template": True},
        "b": {"acc": 0.25, "limit": None, "few_shot": None, "chat_template": False},
    }
    assert json.loads((run / "harness.json").read_text()) == expected
    assert rayfed_lora.Result.open(run).harness == expected
    # The device is the run's.
    (first, device, _), (_, _, include) = asked
    assert (first.limit, first.few_shot, first.chat_template) == (3, 1, True)
    assert (device, include) == ("cpu", str(run.parent))
    (run / "harness.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"harness\.json: expected metrics by task"):
        evaluate_run(str(run), ["a"])
    (run / "harness.json").unlink()


def test_metrics_are_shown_with_counts_as_whole_numbers() -> None:
    found = {"a": {"sample_len": 60, "acc": 0.63333, "limit": None, "chat_template": True}}
    assert harness_rows(found) == [
        {"task": "a", "metric": "sample_len", "value": "60"},
        {"task": "a", "metric": "acc", "value": "0.6333"},
    ]


def test_a_recipe_asks_for_tasks_at_the_end(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake(monkeypatch, {"a": {"acc": 0.5}})
    chosen = {"tasks": ["a"], "limit": 2, "include": str(tmp_path)}
    recipe = chat_recipe(run.parent, evaluation__harness=chosen)
    result = rayfed_lora.run(recipe, str(tmp_path / "run"))
    assert [each.tasks for each, _, _ in asked] == [["a"]]
    assert result.harness["a"] == {
        "acc": 0.5,
        "limit": 2,
        "few_shot": None,
        "chat_template": False,
    }
    # A second call has nothing left to do, and needs no harness.
    without_harness(monkeypatch)
    rayfed_lora.run(recipe, str(tmp_path / "run"), resume=True)
    assert len(asked) == 1


def test_a_harness_that_fails_at_the_end_is_tried_again_by_resuming(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayfed_lora.models import harness as of_models

    fake(monkeypatch, {"a": {"acc": 0.5}})
    works = of_models.scores

    def offline(*arguments: Any) -> dict[str, Any]:
        raise BadInputError("tasks a: ConnectionError: no data set")

    monkeypatch.setattr(of_models, "scores", offline)
    recipe = chat_recipe(run.parent, evaluation__harness=["a"])
    with pytest.raises(RunError, match=r"the run is finished, but .*no data set.*run --resume"):
        rayfed_lora.run(recipe, str(tmp_path / "run"))
    monkeypatch.setattr(of_models, "scores", works)
    result = rayfed_lora.run(recipe, str(tmp_path / "run"), resume=True)
    assert result.harness["a"]["acc"] == 0.5


def test_what_cannot_be_tested_is_rejected_before_anything_starts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, {})
    with pytest.raises(BadInputError, match="one task or more"):
        evaluate_run(str(run), [])
    with pytest.raises(BadInputError, match=r"--tasks: expected tasks .* got hellaswig"):
        evaluate_run(str(run), ["a", "hellaswig"])
    with pytest.raises(BadInputError, match="--include: expected a folder"):
        evaluate_run(str(run), ["a"], include=tmp_path / "none")
    unknown = chat_recipe(run.parent, evaluation__harness=["a", "hellaswig"])
    known = chat_recipe(run.parent, evaluation__harness=["a"])

    def all_reject(recipe: Any, message: str) -> None:
        for ask in (
            lambda: rayfed_lora.run(recipe, str(tmp_path / "b")),
            lambda: rayfed_lora.compare(recipe, ["fedlora"], str(tmp_path / "b")),
            lambda: rayfed_lora.plan(recipe),
        ):
            with pytest.raises(BadInputError, match=message):
                ask()

    all_reject(unknown, r"evaluation.harness.tasks: expected tasks .* got hellaswig")
    without_harness(monkeypatch)
    all_reject(known, r"evaluation.harness.tasks: .*pip install 'rayfed-lora\[harness\]'")
    # Nothing was started.
    assert not (tmp_path / "b").exists()
    with pytest.raises(BadInputError, match="expected none with --detach"):
        refuse(known, "--detach")


def test_a_comparison_tests_each_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake(monkeypatch, {"a": {"acc": 0.5}})
    recipe = chat_recipe(run.parent, evaluation__harness=["a"])
    for _ in range(2):
        rayfed_lora.compare(recipe, ["fedlora", "ffa-lora"], str(tmp_path / "c"))
    assert len(asked) == 2
    assert len([*(tmp_path / "c").rglob("harness.json")]) == 2


def test_a_template_that_is_absent_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, {"a": {"acc": 0.5}})
    evaluate_run(str(run), ["a"], chat_template=True)
    assert "plain text" not in capsys.readouterr().err
    evaluate_run(str(run), ["a"])
    assert (
        "plain text, though the model has a chat template: see --chat-" in capsys.readouterr().err
    )
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    plain = chat_recipe(
        run.parent,
        data__format="text",
        data__text_column="instruction",
        model__tokenizer=str(tmp_path / "tokenizer"),
    )
    rayfed_lora.run(plain, str(tmp_path / "run"))
    with pytest.raises(BadInputError, match="--chat-template: expected a tokenizer with a chat"):
        evaluate_run(str(tmp_path / "run"), ["a"], chat_template=True)


def test_recipes_take_a_list_or_a_mapping(run: Path, tmp_path: Path) -> None:
    short = chat_recipe(run.parent, evaluation__harness=["a"])
    assert short == chat_recipe(run.parent, evaluation__harness={"tasks": ["a"]})
    assert chat_recipe(run.parent, evaluation__harness=[]) == chat_recipe(run.parent)
    with pytest.raises(RecipeError, match="one task or more beside other keys"):
        chat_recipe(run.parent, evaluation__harness={"limit": 3})
    with pytest.raises(RecipeError, match="the harness tests language models"):
        make_recipe().with_({"evaluation.harness": ["a"]})


def test_a_relative_folder_of_tasks_is_kept_as_an_absolute_path(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = chat_recipe(run.parent, evaluation__harness={"tasks": ["a"], "include": "mine"})
    assert with_absolute_paths(recipe).evaluation.harness.include == str(tmp_path / "mine")


def test_a_run_of_images_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {})
    rayfed_lora.run(make_recipe(), str(tmp_path / "run"), factory=FakeFactory())
    with pytest.raises(BadInputError, match="expected a run of a language model"):
        evaluate_run(str(tmp_path / "run"), ["a"])
