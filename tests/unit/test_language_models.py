"""Causal language models: the loss is that of transformers, by token; texts need no labels."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import rayfed_lora
from rayfed_lora.data.client_table import batch_indices
from rayfed_lora.errors import DataError, RecipeError
from rayfed_lora.models.tokens import tokenize_whole
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.training.groups import ClientTask
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.training.weights import assembled, built_weights
from rayfed_lora.types import AdapterState, Factors, LocalPlan
from tests.tasks import initial_tensors, train

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

WORDS = ["how", "many", "who", "is", "where", "the", "dog", "cat", "moon", "far", "old"]
RECIPE: dict[str, Any] = {
    "name": "language",
    "seed": 5,
    "method": "fedlora",
    "model": {
        "task": "causal-lm",
        "source": "config",
        "config": {
            "architecture": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        },
    },
    "adapter": {"alpha": 8},
    "annealing": {
        "initiating": {"rounds": 0},
        "heating": {"rounds": 2, "rank": 2},
        "cooling": {"rounds": 0},
        "holding": {"rounds": 0},
    },
    "clients": {
        "per_round": 3,
        "local_steps": 3,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "lr": 0.5},
    },
    "data": {"max_length": 8, "partition": {"kind": "iid", "clients": 4}},
    "runtime": {"executor": "local", "device": "cpu"},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty texts of 2 to 9 words, without labels, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("texts")
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(WORDS, int(draw.integers(2, 10)))) for _ in range(60)]
    content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (folder / "texts.jsonl").write_text(content)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # No padding token, as most language models have none.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    fast.save_pretrained(str(folder / "tokenizer"))
    return folder


def make_recipe(texts: Path, **overrides: Any) -> Recipe:
    own = {"data.source": str(texts / "texts.jsonl"), "model.tokenizer": str(texts / "tokenizer")}
    return load_recipe(RECIPE, own | {k.replace("__", "."): v for k, v in overrides.items()})


def start(trainer: LocalTrainer) -> AdapterState:
    draw = np.random.default_rng(1)
    factors = {
        name: Factors(
            draw.normal(0, 0.2, (2, m.d_in)).astype(np.float32),
            draw.normal(0, 0.2, (m.d_out, 2)).astype(np.float32),
            4.0,
        )
        for name, m in trainer.shape().modules.items()
    }
    return AdapterState(factors, initial_tensors(trainer, "adapter"))


def plain_loss(net: Any, inputs: dict[str, np.ndarray]) -> Any:
    """Return transformers' own loss: the mean over all tokens but the first and the padding."""
    ids, mask = (torch.tensor(inputs[name]).long() for name in ("input_ids", "attention_mask"))
    return net(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def test_a_text_ends_in_its_token_unless_it_is_cut(texts: Path) -> None:
    rows = prepare(make_recipe(texts)).train
    lengths = rows.inputs["attention_mask"].sum(axis=1)
    assert lengths.max() == 8
    last = rows.inputs["input_ids"][np.arange(len(rows)), lengths - 1]
    assert np.all(last[lengths < 8] == 1)
    assert np.any(last[lengths == 8] != 1)


def test_a_client_trains_as_a_plain_loop_on_transformers_loss_does(texts: Path) -> None:
    recipe = make_recipe(texts)
    workload = prepare(recipe)
    trainer = LocalTrainer(recipe, workload)
    state, plan = start(trainer), LocalPlan(1, "adapter", 10.0, 0.0)
    updates = train(trainer, [2, 0], state, plan)
    for client, update in zip([2, 0], updates, strict=True):
        torch.manual_seed(0)
        # In float64: of the two computations in float32 this was the less exact one.
        net = assembled(recipe, workload, built_weights(recipe, workload)).double()
        net.requires_grad_(False)
        learned = {}
        for name, f in state.factors.items():
            a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (f.a, f.b))
            learned[name] = (a, b)
            net.get_submodule(name).register_forward_hook(
                lambda _, given, out, a=a, b=b: out + 4.0 * given[0] @ a.T @ b.T
            )
        optimizer = torch.optim.SGD([x for pair in learned.values() for x in pair], lr=10.0)
        rng = generator(recipe.seed, Purpose.BATCHES, 1, client)
        rows = workload.clients.examples(client)
        losses = []
        for batch in batch_indices(rows, 4, rng, steps=3):
            loss = plain_loss(net, dict(workload.train.rows(batch).inputs))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert update.train_loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert update.state is not None
        for name, (a, b) in learned.items():
            found = update.state.factors[name]
            np.testing.assert_allclose(found.a, a.detach(), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.b, b.detach(), rtol=1e-4, atol=1e-6)
            assert np.abs(found.b - state.factors[name].b).max() > 3e-3


def test_a_run_records_perplexity_and_its_adapter_has_it_again(texts: Path, tmp_path: Path) -> None:
    recipe = make_recipe(texts, evaluation__client_fraction=0.2, evaluation__batch_size=5)
    result = rayfed_lora.run(recipe, str(tmp_path / "run"))
    final = result.summary["final"]
    assert final["eval_perplexity"] == pytest.approx(math.exp(final["eval_loss"]))
    assert final["eval_macro_f1"] is None
    assert result.summary["clients"]["tested"] == 4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run/base")
    assert isinstance(base.config, LlamaConfig)
    net = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    test = prepare(recipe).test
    with torch.no_grad():
        assert math.exp(plain_loss(net, dict(test.inputs))) == pytest.approx(
            final["eval_perplexity"], rel=1e-5
        )
    assert "Perplexity on the test split" in (tmp_path / "run/report.html").read_text()


def test_rounds_have_tokens_their_rate_and_the_memory(texts: Path, tmp_path: Path) -> None:
    """A client's tokens are those of its batches' texts, without padding."""
    recipe = make_recipe(texts)
    result = rayfed_lora.run(recipe, str(tmp_path / "run"))
    workload, lr = prepare(recipe), recipe.clients.optimizer.lr
    lengths = workload.train.inputs["attention_mask"].sum(axis=1)
    cohorts = result.clients.groupby("round")["client"].apply(list)
    for row in result.rounds.itertuples():
        plan = LocalPlan(row.round, "adapter", lr, 0.0)
        tasks = [
            ClientTask.of(
                client, workload.clients.examples(client), recipe.clients, recipe.seed, plan
            )
            for client in cohorts[row.round]
        ]
        assert row.tokens == sum(int(lengths[rows].sum()) for t in tasks for rows in t.batches)
        assert row.tokens_per_s * row.seconds >= row.tokens > 0
        # At least that of Python and torch.
        assert row.peak_memory_mb > 100


def test_what_needs_labels_or_a_head_is_refused(texts: Path) -> None:
    with pytest.raises(DataError, match=r"need a column label or"):
        prepare(make_recipe(texts, data__partition__kind="dirichlet"))
    with pytest.raises(DataError, match=r"need a column label or"):
        prepare(make_recipe(texts, data__labels=["a", "b"]))
    with pytest.raises(RecipeError, match=r"adapter\.train_head: expected false with model\.task"):
        make_recipe(texts, adapter__train_head=True)
    with pytest.raises(RecipeError, match=r"adapter\.train_head: expected false"):
        make_recipe(texts, method="head-only")


def test_an_end_token_stands_once_even_where_the_tokenizer_adds_it(texts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
    plain = tokenize_whole(tokenizer, ["dog cat", "dog cat moon far"], 4)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    adding = tokenize_whole(tokenizer, ["dog cat", "dog cat moon far"], 4)
    for name, expected in plain.items():
        np.testing.assert_array_equal(adding[name], expected)
    assert plain["input_ids"][0].tolist()[2:] == [1, 0]
    assert plain["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_texts_without_a_token_to_foretell_are_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 20)
    with pytest.raises(DataError, match="need texts of two tokens or more"):
        prepare(make_recipe(texts, data__source=str(tmp_path / "empty.jsonl")))


def test_labels_that_nothing_asks_for_are_not_read(texts: Path, tmp_path: Path) -> None:
    rows = [{"text": f"who is {WORDS[i % 11]}", "label": None} for i in range(60)]
    (tmp_path / "null.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(make_recipe(texts, data__source=str(tmp_path / "null.jsonl")))
    assert prepared.label_names == ("text",)


def test_tied_weights_stay_tied_where_they_travel(texts: Path) -> None:
    config = {**RECIPE["model"]["config"], "tie_word_embeddings": True}
    recipe = make_recipe(texts, model__config=config)
    workload = prepare(recipe)
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(built_weights(recipe, workload), 5, buffer_callback=buffers.append)
    # Each buffer by itself, as an object store hands them out.
    arrived = pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers])
    here, there = LocalTrainer(recipe, workload), LocalTrainer(recipe, workload, weights=arrived)
    tensors = initial_tensors(here, "full")
    full = set(tensors)
    assert "lm_head.weight" not in full
    assert set(initial_tensors(there, "full")) == full
    # What a checkpoint is checked against.
    assert sum(tensor.size for tensor in tensors.values()) == here.shape().total_params


def test_labelled_texts_may_be_dealt_by_label_and_used_without(tmp_path: Path, texts: Path) -> None:
    rows = [{"text": f"who is {WORDS[i % 11]}", "label": i % 3} for i in range(60)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        texts,
        data__source=str(tmp_path / "labelled.jsonl"),
        data__partition={"kind": "dirichlet", "alpha": 0.1, "clients": 4},
    )
    assert prepare(recipe).label_names == ("0", "1", "2")
