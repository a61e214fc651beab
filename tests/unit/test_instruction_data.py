"""Instruction and chat data: tokens, masks, losses over responses, counts, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import rayfed_lora
from rayfed_lora.data.examples import COUNTED
from rayfed_lora.errors import DataError
from rayfed_lora.launching.planning import plan
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.training.weights import assembled
from rayfed_lora.types import AdapterState, Base, LocalPlan
from tests.chats import (
    CHATML,
    character_tokenizer,
    chat_recipe,
    short_tasks,
    user,
    write_formats,
    write_rows,
)
from tests.tasks import initial_tensors, train

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ROWS = short_tasks()


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows in three formats, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chats")
    write_formats(folder, ROWS)
    character_tokenizer().save_pretrained(str(folder / "tokenizer"))
    return folder


def prompt(row: dict[str, str]) -> str:
    return f"<|start|>user\n{user(row)}<|end|>\n<|start|>assistant\n"


def length(row: dict[str, str]) -> int:
    """Return the tokens of a row: a character is one, and so is each of the four special tokens."""
    specials = sum(len(t) - 1 for t in ("<|start|>", "<|end|>") * 2)
    return len(f"{prompt(row)}{row['output']}<|end|>\n") - specials


@pytest.mark.parametrize("template", ["auto", "alpaca", "vicuna"])
def test_three_formats_give_the_same_tokens_and_masks(template: str, chats: Path) -> None:
    alpaca, *others = (
        prepare(chat_recipe(chats, f"{name}.jsonl", data__template=template))
        for name in ("alpaca", "sharegpt", "openai")
    )
    assert alpaca.train.inputs[COUNTED].any()
    for other in others:
        assert other.fingerprint == alpaca.fingerprint
        for split in ("train", "test"):
            expected, found = getattr(alpaca, split).inputs, getattr(other, split).inputs
            assert [*found] == ["input_ids", "attention_mask", COUNTED]
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values)


def test_a_row_is_its_prompt_and_its_counted_response(chats: Path) -> None:
    workload, tokenizer = prepare(chat_recipe(chats)), character_tokenizer()
    seen = set()
    for split in (workload.train, workload.test):
        for i in range(len(split)):
            ids, mask, counted = (values[i] for values in split.inputs.values())
            assert not counted[mask == 0].any()
            first = int(counted.argmax())
            last = first + int(counted.sum())
            # Prompt, response with its end token, and a newline that does not count.
            assert counted[first:last].all()
            assert int(mask.sum()) == last + 1
            seen.add((tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:last])))
    assert seen == {(prompt(row), row["output"] + "<|end|>") for row in ROWS}


def test_each_turn_of_the_assistant_counts(chats: Path, tmp_path: Path) -> None:
    talk = [("user", "a"), ("assistant", "bb"), ("user", "ccc"), ("assistant", "dddd")]
    row = {"messages": [{"role": role, "content": text} for role, text in talk]}
    write_rows(tmp_path / "talks.jsonl", [{**row, "domain": "x"}] * 5)
    recipe = chat_recipe(chats, data__source=str(tmp_path / "talks.jsonl"), clients__per_round=1)
    inputs = prepare(recipe).train.inputs
    counted = [
        int(i) for i, c in zip(*(inputs[n][0] for n in ("input_ids", COUNTED)), strict=True) if c
    ]
    assert character_tokenizer().decode(counted) == "bb<|end|>dddd<|end|>"


def zeros(trainer: LocalTrainer) -> AdapterState:
    return AdapterState({}, initial_tensors(trainer, "adapter"))


def plain_loss(net: Any, inputs: Any, *, responses: bool) -> float:
    """Return transformers' own loss, over responses or over all tokens."""
    ids, mask, counted = (torch.tensor(np.asarray(values)).long() for values in inputs.values())
    labels = ids.masked_fill((counted if responses else mask) == 0, -100)
    with torch.no_grad():
        return float(net(input_ids=ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_losses_are_those_of_transformers_with_other_labels_hidden(
    loss_on: str, chats: Path
) -> None:
    masked = prepare(chat_recipe(chats))
    recipe = chat_recipe(chats, data__loss_on=loss_on, clients__local_steps=1)
    workload = prepare(recipe)
    assert (COUNTED in workload.train.inputs) == (loss_on == "response")
    trainer = LocalTrainer(recipe, workload)
    state = zeros(trainer)
    trainer._model.load([state], Base(), "adapter")
    trainer._model.train(False)
    rows = np.arange(len(workload.test))
    found = trainer._testing.predictions(workload.test.rows(rows))
    net, responses = assembled(recipe, workload, trainer._weights).eval(), loss_on == "response"
    expected = plain_loss(net, masked.test.rows(rows).inputs, responses=responses)
    assert found.losses.sum() / found.predicted.sum() == pytest.approx(expected, abs=1e-6)
    # Accuracy is over the same tokens.
    inputs = masked.test.rows(rows).inputs
    with torch.no_grad():
        ids = torch.tensor(inputs["input_ids"]).long()
        mask = torch.tensor(inputs["attention_mask"]).long()
        best = net(input_ids=ids, attention_mask=mask).logits[:, :-1].argmax(-1).numpy()
    counts = inputs[COUNTED if responses else "attention_mask"][:, 1:] > 0
    assert found.predicted.sum() == counts.sum()
    assert found.correct.sum() == ((best == inputs["input_ids"][:, 1:]) & counts).sum()


def test_a_client_trains_on_its_responses_alone_or_beside_others(chats: Path) -> None:
    recipe = chat_recipe(chats, clients__local_steps=1, clients__batch_size=100)
    workload = prepare(recipe)
    trainer = LocalTrainer(recipe, workload)
    updates = train(trainer, [0, 1, 2], zeros(trainer), LocalPlan(0, "adapter", 0.1, 0.0))
    net = assembled(recipe, workload, trainer._weights).train()
    for client, update in enumerate(updates):
        # A batch of all examples: their order does not matter.
        rows = workload.train.rows(workload.clients.examples(client))
        expected = plain_loss(net, rows.inputs, responses=True)
        assert update.train_loss == pytest.approx(expected, abs=1e-6)


def test_what_is_cut_is_counted_and_rows_without_a_response_are_left_out(chats: Path) -> None:
    most = 35
    kept = [row for row in ROWS if length(row) - len(row["output"]) - 2 < most]
    cut = [row for row in ROWS if length(row) > most]
    # Some are cut whole, some in part, some not at all.
    assert 0 < len(ROWS) - len(kept) < len(cut) < len(ROWS)
    recipe = chat_recipe(chats, data__max_length=most, clients__per_round=2)
    outline = plan(recipe).outline
    workload = prepare(recipe)
    assert workload.clients.counts.tolist() == outline.devices.sizes.tolist()
    assert len(workload.train) + len(workload.test) == len(kept)
    texts = outline.texts
    assert texts is not None
    assert texts.rows - texts.unanswered == len(workload.train)
    assert texts.unanswered == texts.cut_off
    assert texts.response_tokens == workload.train.inputs[COUNTED].sum()
    tokens = workload.train.inputs["attention_mask"].sum()
    assert texts.prompt_tokens == tokens - texts.response_tokens
    line = f"train rows: {texts.unanswered} of {texts.rows} have no response and are left out"
    assert any(note.startswith(line) for note in outline.notes)
    assert any(f"are cut at data.max_length {most} tokens" in note for note in workload.notes)


def test_a_plan_counts_rows_and_tokens(chats: Path) -> None:
    planned = plan(chat_recipe(chats, data__test_source=None))
    texts = planned.outline.texts
    assert texts is not None
    assert (texts.cut, texts.unanswered) == (0, 0)
    assert texts.longest <= max(map(length, ROWS))
    assert texts.line(chat_recipe(chats).data) in planned.needs


def test_a_length_that_leaves_no_response_is_an_error_before_anything_starts(chats: Path) -> None:
    shortest = min(len(prompt(row)) for row in ROWS) - 2 * len("<|start|>") - len("<|end|>")
    recipe = chat_recipe(chats, data__max_length=shortest)
    for start in (plan, prepare):
        with pytest.raises(
            DataError, match=rf"data\.max_length {shortest} cuts .* raise data\.max"
        ):
            start(recipe)


def test_rows_without_a_response_are_told_from_those_that_lose_it(
    chats: Path, tmp_path: Path
) -> None:
    rows = [{**row, "output": ""} for row in ROWS]
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="no row has a text in a turn of the assistant"):
        prepare(chat_recipe(chats, data__source=str(tmp_path / "rows.jsonl")))
    write_rows(tmp_path / "some.jsonl", [*rows[:6], *ROWS])
    some = chat_recipe(chats, data__source=str(tmp_path / "some.jsonl"))
    workload = prepare(some)
    assert len(workload.train) + len(workload.test) == len(ROWS)
    everything = prepare(
        some.model_copy(update={"data": some.data.model_copy(update={"loss_on": "all"})})
    )
    assert len(everything.train) + len(everything.test) == len(ROWS) + 6


def test_another_template_is_another_workload(chats: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    recipe = chat_recipe(chats, data__template=str(file))
    before = prepare(recipe).fingerprint
    # A run that is resumed compares these.
    assert before == prepare(chat_recipe(chats)).fingerprint
    file.write_text(CHATML.replace("m['role'] +", "m['role'] + '!' +"))
    assert prepare(recipe).fingerprint["training examples"] != before["training examples"]


def test_the_template_travels_with_the_export(chats: Path, tmp_path: Path) -> None:
    recipe = chat_recipe(chats, data__template="alpaca", clients__local_steps=1)
    rayfed_lora.run(recipe, str(tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    messages = [{"role": "user", "content": "Do it."}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("request.\n\n### Instruction:\nDo it.\n\n### Response:\n")
    assert json.loads((tmp_path / "run/summary.json").read_text())["final"]["eval_loss"] > 0
