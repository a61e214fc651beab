"""Padding never reaches a result: a text alone and among longer ones has the same logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import rayfed_lora
from rayfed_lora.errors import ModelError
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.models.base_models import restored
from rayfed_lora.models.base_weights import build
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.tokens import pad_with
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.drawing import tensors
from rayfed_lora.training.preparing import outline, prepare
from tests.fakes import make_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
NAMES = ["dog", "cat", "moon", "far", "old", "the", "is", "who", "how", "many", "where"]
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
MODELS: dict[str, Any] = {
    "gpt2": lambda **own: GPT2ForSequenceClassification(GPT2Config(**SIZES["gpt2"], **own)),
    "llama": lambda **own: LlamaForSequenceClassification(LlamaConfig(**SIZES["llama"], **own)),
}


def write_tokenizer(
    folder: Path, specials: Sequence[str], *, ends: bool = False, **own: str
) -> str:
    """Write a tokenizer whose first tokens are the special ones."""
    vocabulary = {word: i for i, word in enumerate([*specials, *NAMES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **own)
    fast.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty texts of 0 to 7 words and two classes."""
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(draw.choice(NAMES, i % 8)), "label": f"c{i % 2}"} for i in range(40)]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(texts: str, source: str, tokenizer: str, **overrides: Any) -> Recipe:
    values = {
        "model__task": "text-classification",
        "model__source": source,
        "model__tokenizer": tokenizer,
        "model__config": {},
        "adapter__target_modules": ["q_proj", "attn.c_attn", "query"],
        "annealing__mode": "full",
        "data__source": texts,
        "data__max_length": 9,
    }
    return make_recipe(**values | overrides)


def check_alone_and_together(recipe: Recipe) -> torch.Tensor:
    """See that every example has the same logits alone and in one batch; return them."""
    workload = prepare(recipe)
    net = build(recipe.model, restored(workload.config), recipe.seed).eval()
    rows = np.arange(len(workload.train))
    lengths = workload.train.inputs["attention_mask"].sum(axis=1)
    assert lengths.min() == 1 and lengths.max() >= 7
    with torch.no_grad():
        together = net(**tensors(workload.train.rows(rows))[0]).logits
        alone = torch.cat(
            [net(**tensors(workload.train.rows(rows[i : i + 1]))[0]).logits for i in rows]
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    # Texts differ, and so do their logits: all are read where they end.
    assert len(torch.unique(together[:, 0].round(decimals=5))) > len(rows) / 2
    return together


def saved(kind: str, folder: Path, **own: Any) -> str:
    torch.manual_seed(0)
    with quiet():
        net = MODELS[kind](vocab_size=20, num_labels=2, initializer_range=0.5, **own)
        net.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("pad", [None, 5, -1])
def test_a_decoder_reads_the_last_word_whatever_its_configuration_pads_with(
    kind: str, pad: int | None, texts: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "</s>", "[PAD]"], pad_token="[PAD]")
    recipe = make(texts, saved(kind, tmp_path / "m", pad_token_id=pad), tokenizer)
    check_alone_and_together(recipe)
    workload = prepare(recipe)
    assert workload.config["pad_token_id"] == 2
    padding = workload.train.inputs["attention_mask"] == 0
    assert set(workload.train.inputs["input_ids"][padding]) == {2}


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tokenizer_without_a_padding_token_pads_with_its_end(
    kind: str, ends: bool, texts: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "</s>"], ends=ends, eos_token="</s>")
    recipe = make(texts, saved(kind, tmp_path / "m"), tokenizer)
    assert "padded with '</s>'" in " ".join(prepare(recipe).notes)
    check_alone_and_together(recipe)
    assert prepare(recipe).config["pad_token_id"] == 1


def test_a_tokenizer_without_an_end_pads_with_the_unknown_token(texts: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]"])
    recipe = make(texts, saved("gpt2", tmp_path / "m"), tokenizer)
    assert "padded with '[UNK]'" in " ".join(prepare(recipe).notes)
    check_alone_and_together(recipe)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_random_models_know_the_tokens_of_their_tokenizer(
    kind: str, texts: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(
        tmp_path / "t", ["[UNK]", "</s>", "[PAD]", "<s>"], pad_token="[PAD]", eos_token="</s>"
    )
    own = {"architecture": kind, **SIZES[kind], "initializer_range": 0.5}
    recipe = make(texts, "config", tokenizer, model__config=own)
    check_alone_and_together(recipe)
    config = prepare(recipe).config
    assert (config["pad_token_id"], config["eos_token_id"], config["vocab_size"]) == (2, 1, 15)


def test_a_padding_token_of_the_recipe_is_kept_and_written(texts: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "</s>", "[PAD]"], pad_token="[PAD]")
    source = saved("gpt2", tmp_path / "m")
    recipe = make(texts, source, tokenizer, model__config={"pad_token_id": 19})
    check_alone_and_together(recipe)
    inputs = prepare(recipe).train.inputs
    assert set(inputs["input_ids"][inputs["attention_mask"] == 0]) == {19}


def test_positions_that_are_counted_from_the_padding_token_stay(texts: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[PAD]", "[UNK]", "</s>"], pad_token="[PAD]")
    config = RobertaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=20,
        max_position_embeddings=32,
        pad_token_id=17,
        initializer_range=0.5,
    )
    with quiet():
        RobertaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    recipe = make(texts, str(tmp_path / "m"), tokenizer)
    found = check_alone_and_together(recipe)
    # As transformers computes it from the source's own configuration.
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    workload = prepare(recipe)
    with torch.no_grad():
        inputs = tensors(workload.train.rows(np.arange(len(workload.train))))[0]
        torch.testing.assert_close(net(**inputs).logits, found)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    texts: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "[PAD]"], pad_token="[PAD]")
    with quiet():
        MODELS["gpt2"](vocab_size=12, num_labels=2).save_pretrained(tmp_path / "m")
    recipe = make(texts, str(tmp_path / "m"), tokenizer)
    # 2 special tokens and 11 words: the last is 12.
    for reads in (outline, prepare):
        with pytest.raises(ModelError, match=r"tokens below 12, .* largest is 12 \('where'\)"):
            reads(recipe)


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_added_tokens_beyond_the_embeddings_are_refused_only_where_they_occur(
    task: str, texts: str, tmp_path: Path
) -> None:
    folder = write_tokenizer(tmp_path / "t", ["[UNK]", "[PAD]"], pad_token="[PAD]")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # 2 special tokens and 11 words before it.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == 13
    tokenizer.save_pretrained(folder)
    with quiet():
        net = MODELS["llama"](vocab_size=13, num_labels=2)
        if task == "causal-lm":
            net = LlamaForCausalLM(LlamaConfig(**SIZES["llama"], vocab_size=13))
        net.save_pretrained(tmp_path / "m")
    own: dict[str, Any] = {"model__task": task, "adapter__train_head": task != "causal-lm"}
    own["adapter__target_modules"] = "auto"
    recipe = make(texts, str(tmp_path / "m"), folder, **own)
    assert outline(recipe).test_examples > 0
    assert prepare(recipe).train.inputs["input_ids"].max() == 12
    lines = Path(texts).read_text() + json.dumps({"text": "old <image> moon", "label": "c0"})
    (tmp_path / "more.jsonl").write_text(lines)
    with pytest.raises(ModelError, match=r"below 13, .* got 13 \('<image>'\) in the text 'old <im"):
        prepare(make(str(tmp_path / "more.jsonl"), str(tmp_path / "m"), folder, **own))


def test_a_padding_token_beyond_the_embeddings_is_refused(texts: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "[PAD]"], pad_token="[PAD]")
    recipe = make(
        texts, saved("gpt2", tmp_path / "m"), tokenizer, model__config={"pad_token_id": 20}
    )
    with pytest.raises(ModelError, match=r"pad_token_id: expected a token below 20, .* got 20"):
        prepare(recipe)


def test_padding_is_written_behind_texts_and_an_empty_text_is_one_token() -> None:
    ids = np.array([[4, 5, 9], [6, 9, 9], [9, 9, 9]], np.int32)
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], np.int32)
    found = pad_with({"input_ids": ids, "attention_mask": mask}, 3)
    assert found["input_ids"].tolist() == [[4, 5, 9], [6, 3, 3], [3, 3, 3]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_inputs_that_the_model_does_not_take_are_left_out(texts: str, tmp_path: Path) -> None:
    folder = Path(write_tokenizer(tmp_path / "t", ["[UNK]", "[PAD]"], pad_token="[PAD]"))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told["model_input_names"] = ["input_ids", "token_type_ids"]
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    recipe = make(texts, saved("llama", tmp_path / "m"), str(folder))
    assert [*prepare(recipe).train.inputs] == ["input_ids", "attention_mask"]
    check_alone_and_together(recipe)


def test_a_merged_model_and_its_tokenizer_carry_the_padding_token(
    texts: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "</s>"], eos_token="</s>")
    recipe = make(
        texts,
        saved("llama", tmp_path / "m"),
        tokenizer,
        adapter__target_modules="auto",
        annealing__mode="fixed",
    )
    result = rayfed_lora.run(recipe, str(tmp_path / "run"))
    list(export_run(str(tmp_path / "run"), tmp_path / "merged", merge=True))
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    plain = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (net.config.pad_token_id, plain.pad_token) == (1, "</s>")
    test = prepare(recipe).test
    with torch.no_grad():
        logits = net(**tensors(test.rows(np.arange(len(test))))[0]).logits
    right = float((logits.argmax(dim=1).numpy() == test.labels).mean())
    assert right == pytest.approx(result.summary["final"]["eval_accuracy"])


@pytest.mark.parametrize(("kind", "pad"), [("llama", 5), ("gpt2", None)])
def test_an_exported_adapter_pads_as_the_run_did(
    kind: str, pad: int | None, texts: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "</s>", "[PAD]"], pad_token="[PAD]")
    recipe = make(
        texts,
        saved(kind, tmp_path / "m", pad_token_id=pad),
        tokenizer,
        adapter__target_modules="auto",
        annealing__mode="fixed",
        annealing__initiating__rounds=0,
    )
    # A value of the recipe's own would keep the base anyhow.
    model = recipe.model.model_copy(update={"config": {}})
    recipe = recipe.model_copy(update={"model": model})
    rayfed_lora.run(recipe, str(tmp_path / "run"))
    list(export_run(str(tmp_path / "run"), tmp_path / "plain", merge=False))
    list(export_run(str(tmp_path / "run"), tmp_path / "merged", merge=True))
    said = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(said["base_model_name_or_path"])
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "plain")).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    test = prepare(recipe).test
    inputs = tensors(test.rows(np.arange(len(test))))[0]
    assert (inputs["attention_mask"] == 0).any()
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5
        )


def test_a_classifier_that_reads_padding_is_reported(texts: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t", ["[UNK]", "[PAD]"], pad_token="[PAD]")
    own = {"architecture": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    recipe = make(texts, "config", tokenizer, model__config=own)
    assert any("reads padding too (summary_type 'last')" in note for note in prepare(recipe).notes)
    first = make(texts, "config", tokenizer, model__config={**own, "summary_type": "first"})
    assert prepare(first).notes == ()
