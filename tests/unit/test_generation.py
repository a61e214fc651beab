"""Answers of a language model to the prompts of the test split (`evaluation.generate`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rayfed_lora
from rayfed_lora.cli.run_display import answer_rows
from rayfed_lora.data.prompts import Answer, PromptFacts
from rayfed_lora.errors import DataError, RecipeError, RunError
from rayfed_lora.federation.generation import exact_match, rouge_l, scored
from rayfed_lora.training.preparing import prepare
from tests.chats import character_tokenizer, chat_recipe, short_tasks, user, write_formats

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ROWS = short_tasks(30)
ASKED = {"max_new_tokens": 12, "examples": "all"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_formats(folder, ROWS)
    character_tokenizer().save_pretrained(str(folder / "tokenizer"))
    return folder


def recipe(chats: Path, **changes: Any) -> rayfed_lora.Recipe:
    settings = {"evaluation__generate": ASKED, "data__test_fraction": 0.3, **changes}
    return chat_recipe(chats, **settings)


@pytest.mark.parametrize(
    ("generated", "response", "expected"),
    [
        # Words in order: the, cat, sat of (the, cat, sat, down) and (the, cat, now, sat).
        ("the cat sat down", "The cat now sat!", 2 * 3 / 8),
        ("a b c", "c b a", 2 * 1 / 6),
        ("same", "same", 1.0),
        ("", "same", 0.0),
        ("...", "same", 0.0),
        ("one two", "three", 0.0),
        ("It is 12.", "It is 13.", 2 * 2 / 6),
    ],
)
def test_rouge_l_is_f1_of_the_longest_common_subsequence(
    generated: str, response: str, expected: float
) -> None:
    assert rouge_l(generated, response) == pytest.approx(expected)
    assert rouge_l(response, generated) == pytest.approx(expected)


def test_scores_are_means_of_all_and_of_each_group() -> None:
    texts = [("a", "a"), ("a b", "a"), (" c\n", "c"), ("x", "y")]
    answers = [Answer(i, "p", response, made) for i, (made, response) in enumerate(texts)]
    assert [exact_match(each) for each in answers] == [True, False, True, False]
    found = scored(answers, PromptFacts(4, ("k", "k", "l", "l"), ("d", "d", "d", "e")))
    assert found["exact_match"] == 0.5
    assert found["rouge_l"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert found["by_client"]["k"] == {
        "examples": 2,
        "exact_match": 0.5,
        "rouge_l": pytest.approx(5 / 6),
    }
    assert {name: own["examples"] for name, own in found["by_domain"].items()} == {"d": 3, "e": 1}


def test_prompts_are_those_of_the_test_rows_up_to_their_response(chats: Path) -> None:
    prompts, tokenizer = prepare(recipe(chats)).prompts, character_tokenizer()
    assert prompts is not None
    # Some prompts are the same for several rows.
    expected = {
        (
            f"<|start|>user\n{user(row)}<|end|>\n<|start|>assistant\n",
            row["output"] + "<|end|>",
            row["domain"],
        )
        for row in ROWS
    }
    assert prompts.facts.count == 9
    asked = zip(prompts.ids, prompts.responses, prompts.facts.domains or (), strict=True)
    found = {(tokenizer.decode(ids), tokenizer.decode(own), domain) for ids, own, domain in asked}
    assert len(found) == 9
    assert found <= expected
    # The clients are the domains here.
    assert prompts.facts.clients == prompts.facts.domains


def test_some_are_drawn_from_the_seed(chats: Path) -> None:
    few = {"max_new_tokens": 4, "examples": 5}

    def drawn(seed: int) -> list[bytes]:
        prompts = prepare(recipe(chats, evaluation__generate=few, seed=seed)).prompts
        assert prompts is not None
        return [each.tobytes() for each in prompts.ids]

    assert len(drawn(5)) == 5
    assert drawn(5) == drawn(5)


def test_answers_are_those_of_plain_transformers_one_prompt_at_a_time(
    chats: Path, tmp_path: Path
) -> None:
    """Trained until the answers differ from prompt to prompt; batches are padded on the left."""
    trained = recipe(
        chats,
        clients__local_steps=30,
        clients__optimizer={"name": "adamw", "lr": 0.02},
        annealing__heating={"rounds": 3, "rank": 4},
        adapter__target_modules="all-linear",
    )
    result = rayfed_lora.run(trained, str(tmp_path / "run"))
    rows = pd.read_parquet(tmp_path / "run" / "answers.parquet")
    assert [*rows["round"].unique()] == [2]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run/base")
    net = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    prompts, tokenizer = prepare(trained).prompts, character_tokenizer()
    assert prompts is not None
    expected = []
    for ids in prompts.ids:
        row = torch.tensor(np.asarray(ids, np.int64))[None]
        made: list[int] = []
        while len(made) < ASKED["max_new_tokens"]:
            with torch.no_grad():
                token = int(net(input_ids=row).logits[0, -1].argmax())
            if tokenizer.decode([token]) in ("<|end|>", "</s>"):
                break
            made.append(token)
            row = torch.cat([row, torch.tensor([[token]])], dim=1)
        expected.append(tokenizer.decode(made, skip_special_tokens=True))
    assert rows["generated"].tolist() == expected
    assert len({*expected}) > 1
    # Scores stand in the table, in the round and in the summary.
    found = result.summary["generation"]
    assert found["exact_match"] == rows["exact_match"].mean()
    assert found["rouge_l"] == pytest.approx(rows["rouge_l"].mean())
    last = result.rounds.iloc[-1]
    assert last["eval_exact_match"] == found["exact_match"]
    assert last["eval_rouge_l"] == pytest.approx(found["rouge_l"])
    assert result.rounds["eval_rouge_l"].iloc[:-1].isna().all()
    assert result.summary["final"]["eval_rouge_l"] == pytest.approx(found["rouge_l"])
    assert found["by_domain"].keys() == {"add", "name", "upper"}
    assert found["base"]["examples"] == found["examples"] == 9


def test_the_same_on_threads_and_after_a_resume(chats: Path, tmp_path: Path) -> None:
    own = recipe(
        chats,
        evaluation__generate={**ASKED, "every": 1, "base": False},
        annealing__heating={"rounds": 2, "rank": 2},
    )
    whole = rayfed_lora.run(own, str(tmp_path / "a"))

    def broken(done: rayfed_lora.FinishedRound) -> None:
        assert done.record.round < 1

    with pytest.raises(RunError):
        rayfed_lora.run(own, str(tmp_path / "b"), callbacks=[broken])
    again = rayfed_lora.run(own, str(tmp_path / "b"), resume=True)
    threads = own.with_({"runtime.client_actors": 2, "evaluation.batch_size": 4})
    parallel = rayfed_lora.run(threads, str(tmp_path / "c"))
    tables = [pd.read_parquet(tmp_path / name / "answers.parquet") for name in "abc"]
    assert [*tables[0]["round"].unique()] == [0, 1]
    for table, result in zip(tables, (whole, again, parallel), strict=True):
        pd.testing.assert_frame_equal(table, tables[0])
        assert result.summary["generation"] == whole.summary["generation"]
        assert "base" not in result.summary["generation"]
    assert "answers.parquet" in (tmp_path / "a" / "SHA256SUMS").read_text()


def test_responses_that_are_cut_are_not_asked_for(chats: Path) -> None:
    with pytest.raises(DataError, match="test rows with a whole response, got none"):
        # Prompts of 27 tokens and more.
        prepare(recipe(chats, data__max_length=26, data__loss_on="all"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__format": "text"}, "evaluation.generate.*expected null but with instruction"),
        ({"evaluation__generate": {"examples": 0}}, "evaluation.generate.examples"),
        ({"evaluation__generate": {"max_new_tokens": 0}}, "evaluation.generate.max_new_tokens"),
        ({"evaluation__generate": {"beams": 2}}, "unknown key"),
    ],
)
def test_what_cannot_be_asked_is_rejected(
    chats: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(chats, **changes)


def test_plain_texts_have_no_prompts(chats: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join('{"text": "some words", "domain": "a"}' for _ in range(20)))
    plain = recipe(chats, data__source=str(texts), clients__per_round=1)
    with pytest.raises(DataError, match="expected instruction or chat data"):
        rayfed_lora.plan(plain)


def test_the_terminal_shows_answers_by_domain_beside_the_base() -> None:
    own = {"examples": 2, "exact_match": 0.5, "rouge_l": 0.75}
    base = {"examples": 2, "exact_match": 0.0, "rouge_l": 0.25}
    found = {**own, "by_domain": {"dates": own}, "base": {**base, "by_domain": {"dates": base}}}
    rows = answer_rows(found)
    assert [row["answers"] for row in rows] == ["all", "dates"]
    assert rows[1] == {
        "answers": "dates",
        "prompts": "2",
        "exact match": "0.500",
        "exact match of the base": "0.000",
        "ROUGE-L": "0.750",
        "ROUGE-L of the base": "0.250",
    }
    alone = answer_rows({**own, "by_client": {"k": own}})
    assert [*alone[1]] == ["answers", "prompts", "exact match", "ROUGE-L"]
