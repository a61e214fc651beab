"""Language models under lm-evaluation-harness (`rayfed-lora evaluate`, `evaluation.harness`)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rayfed_lora
from rayfed_lora.errors import BadInputError, RecipeError
from rayfed_lora.launching import harness
from rayfed_lora.launching.harness import evaluate_run
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
    """Replace the harness; return what it is asked for."""
    from rayfed_lora.models import harness as of_models

    asked: list[Any] = []

    def scores(folder: Path, tasks: Any, **options: Any) -> dict[str, Any]:
        assert (folder / "model.safetensors").is_file()
        assert (folder / "tokenizer.json").is_file()
        asked.append((list(tasks), options))
        return {task: results[task] for task in tasks}

    monkeypatch.setattr(of_models, "scores", scores)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())
    return asked


def test_results_are_kept_beside_those_of_other_tasks(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "harness.json").unlink(missing_ok=True)
    asked = fake(monkeypatch, {"a": {"acc": 0.5}, "b": {"acc": 0.25}})
    assert evaluate_run(str(run), ["a"], limit=3, few_shot=1) == {"a": {"acc": 0.5}}
    evaluate_run(str(run), ["b"])
    assert json.loads((run / "harness.json").read_text()) == {
        "a": {"acc": 0.5, "limit": 3, "few_shot": 1},
        "b": {"acc": 0.25, "limit": None, "few_shot": None},
    }
    assert asked[0][1]["limit"] == 3


def test_a_recipe_asks_for_tasks_at_the_end(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake(monkeypatch, {"a": {"acc": 0.5}})
    recipe = chat_recipe(run.parent, evaluation__harness=["a"])
    rayfed_lora.run(recipe, str(tmp_path / "run"))
    assert [tasks for tasks, _ in asked] == [["a"]]
    assert (tmp_path / "run" / "harness.json").is_file()


def test_what_cannot_be_tested_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_recipe()
    with pytest.raises(RecipeError, match="the harness tests language models"):
        images.with_({"evaluation.harness": ["a"]})
    fake(monkeypatch, {})
    with pytest.raises(BadInputError, match="one task or more"):
        evaluate_run(str(run), [])
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    for ask in (
        lambda: evaluate_run(str(run), ["a"]),
        lambda: rayfed_lora.run(
            chat_recipe(run.parent, evaluation__harness=["a"]), str(tmp_path / "b")
        ),
    ):
        with pytest.raises(BadInputError, match=r"pip install 'rayfed-lora\[harness\]'"):
            ask()
    # Nothing was started.
    assert not (tmp_path / "b").exists()


def test_a_run_of_images_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())
    rayfed_lora.run(make_recipe(), str(tmp_path / "run"), factory=FakeFactory())
    with pytest.raises(BadInputError, match="expected a run of a language model"):
        evaluate_run(str(tmp_path / "run"), ["a"])
