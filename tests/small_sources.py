"""Small models and texts that tests of a model's source write to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from rayfed_lora.errors import ModelError
from rayfed_lora.models.quiet import quiet
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import outline, prepare
from tests.fakes import make_recipe

CLASSES = 3
Tensors = dict[str, torch.Tensor]


def vit(**own: Any) -> ViTForImageClassification:
    """One layer of width 16 on 1 x 8 x 8 images, as digits are."""
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": CLASSES,
    }
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(**values | own))


def bert_config(**own: Any) -> BertConfig:
    values = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 40,
        "max_position_embeddings": 16,
    }
    return BertConfig(**values | own)


def saved(net: nn.Module, folder: Path) -> Path:
    with quiet():
        net.save_pretrained(folder)  # type: ignore[operator]
    return folder


def changed(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def on_digits(folder: Path, **overrides: Any) -> Recipe:
    """Return a recipe on the first three digits; nothing of it is trained in a full round."""
    values = {
        "model__source": str(folder),
        "model__config": {},
        "data__labels": [0, 1, 2],
        "data__max_examples": 60,
        "annealing__initiating__rounds": 0,
    }
    return make_recipe(**values | overrides)


def on_texts(folder: Path, words: Path, **overrides: Any) -> Recipe:
    values = {
        "model__task": "text-classification",
        "model__source": str(folder),
        "model__tokenizer": str(words / "tokenizer"),
        "model__config": {},
        "data__source": str(words / "texts.jsonl"),
        "data__max_length": 8,
        "annealing__initiating__rounds": 0,
    }
    return make_recipe(**values | overrides)


def write_words(folder: Path) -> Path:
    """Write sixty labelled texts and a tokenizer of 14 words for them."""
    names = ["dog", "cat", "moon", "far", "old", "the", "is", "who", "how", "many", "where"]
    draw = np.random.default_rng(0)
    rows = [
        {"text": " ".join(draw.choice(names, int(draw.integers(1, 8)))), "label": f"c{i % 3}"}
        for i in range(60)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>"
    )
    fast.save_pretrained(str(folder / "tokenizer"))
    return folder


def both_refuse(recipe: Recipe, message: str) -> None:
    """See that `plan` and `run` refuse alike."""
    for reads in (outline, prepare):
        with pytest.raises(ModelError, match=message):
            reads(recipe)
