"""Own nn.Modules for texts: classifiers and causal language models, with a named tokenizer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import rayfed_lora
from rayfed_lora.errors import ModelError, PluginError, RecipeError
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.plugins import model
from rayfed_lora.recipe.loading import load_recipe
from tests.small_sources import write_words

pytestmark = [
    pytest.mark.usefixtures("forgotten_methods"),
    # PEFT asks transformers 5 for a property that it is about to rename.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]
TEXTS, LANGUAGE = "text-classification", "causal-lm"
VALUES = {
    "name": "own",
    "data": {"max_length": 8, "test_fraction": 0.25, "partition": {"clients": 4, "kind": "iid"}},
    "annealing": {
        "initiating": {"rounds": 1},
        "heating": {"rounds": 1, "rank": 4},
        "cooling": {"rounds": 1, "rank": 2},
        "holding": {"rounds": 0},
    },
    "adapter": {"target_modules": "all-linear"},
    "clients": {"per_round": 3, "local_steps": 20, "batch_size": 8, "optimizer": {"lr": 0.2}},
    "runtime": {"executor": "local"},
}
# The words of the tokenizer, and its three special tokens.
VOCABULARY = 14


class Bag(nn.Module):
    """The mean embedding of a text's tokens, and two linear layers."""

    def __init__(self, vocabulary, classes, width):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.inside = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids, mask):
        weights = mask.unsqueeze(2).float()
        mean = (self.words(ids) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.head(torch.tanh(self.inside(mean)))


class Recurrent(nn.Module):
    """Sums of the embeddings so far, and an output layer that may share their weights."""

    def __init__(self, vocabulary, width, *, tied, causal):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.inside = nn.Linear(width, width)
        self.out = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.out.weight = self.words.weight
        self.causal = causal

    def forward(self, ids, mask):
        each = self.words(ids) * mask.unsqueeze(2)
        seen = each.cumsum(1) if self.causal else each.sum(1, keepdim=True).expand_as(each)
        return self.out(torch.tanh(self.inside(seen)))


def bag():
    @model("bag-of-a-test", task=TEXTS)
    def made(vocabulary, length, classes, *, width: int = 6):
        assert length == 8
        return Bag(vocabulary, classes, width)

    return made


def recurrent():
    @model("recurrent-of-a-test", task=LANGUAGE)
    def made(vocabulary, length, *, width: int = 8, tied: bool = False, causal: bool = True):
        return Recurrent(vocabulary, width, tied=tied, causal=causal)

    return made


def rows(count=120):
    """Return texts that are told apart by one word."""
    draw = np.random.default_rng(3)
    words = ["dog", "cat", "old", "the", "is", "who", "how"]
    marks = np.arange(count) % 2
    texts = [f"{' '.join(draw.choice(words, 4))} {('moon', 'far')[mark]}" for mark in marks]
    return pd.DataFrame({"text": texts, "label": marks})


def recipe_of(chosen, words, task=None):
    own = {"tokenizer": str(words / "tokenizer")} | ({} if task is None else {"task": task})
    return load_recipe(VALUES | {"model": own}, plugins=[chosen])


@pytest.fixture
def words(tmp_path):
    return write_words(tmp_path)


def test_a_classifier_learns_alike_in_threads_and_loads_in_plain_peft(words):
    recipe = recipe_of(bag()(width=5), words)
    assert (recipe.model.task, recipe.model.source) == (TEXTS, "config")
    runs = [
        rayfed_lora.run(
            recipe.with_({"runtime.client_actors": threads}), str(words / str(threads)), data=rows()
        )
        for threads in (1, 2)
    ]
    one, two = runs
    assert one.summary["adapter_sha256"] == two.summary["adapter_sha256"]
    assert one.rounds["eval_accuracy"].iloc[-1] > 0.9
    folder = words / "1"
    written = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    # The inner layer has factors of rank 2, the head is sent whole.
    assert shapes["base_model.model.net.inside.lora_A.weight"] == (2, 5)
    assert shapes["base_model.model.net.head.weight"] == (2, 5)
    base = AutoModelForSequenceClassification.from_pretrained(str(folder / "base"))
    assert (base.config.vocab_size, base.config.max_position_embeddings) == (VOCABULARY, 8)
    adapted = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "adapter"))
    tokens = tokenizer(["dog moon", "the old cat is far"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = adapted(**tokens).logits
        torch.testing.assert_close(one.model().eval()(**tokens).logits, logits)
    assert logits.argmax(dim=1).tolist() == [0, 1]


def test_its_merged_model_is_the_module_with_other_weights(words):
    recipe = recipe_of(bag()(), words)
    run = rayfed_lora.run(recipe, str(words / "run"), data=rows())
    list(export_run(str(words / "run"), words / "whole", merge=True))
    weights = load_file(str(words / "whole" / "model.safetensors"))
    module = Bag(VOCABULARY, 2, 6)
    module.load_state_dict({name.removeprefix("net."): w for name, w in weights.items()})
    ids = torch.tensor([[3, 4, 5, 6], [7, 5, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        expected = run.model().eval()(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(module(ids, mask), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_learns_alike_in_threads_and_generates(tied, words):
    recipe = recipe_of(recurrent()(tied=tied), words)
    assert (recipe.model.task, recipe.adapter.train_head) == (LANGUAGE, False)
    one, two = (
        rayfed_lora.run(
            recipe.with_({"runtime.client_actors": threads}), str(words / str(threads)), data=rows()
        )
        for threads in (1, 2)
    )
    assert one.summary["adapter_sha256"] == two.summary["adapter_sha256"]
    assert one.rounds["eval_loss"].iloc[-1] < one.rounds["eval_loss"].iloc[0]
    folder = words / "1"
    base = AutoModelForCausalLM.from_pretrained(str(folder / "base"))
    assert (base.net.out.weight is base.net.words.weight) == tied
    adapted = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    ids = torch.tensor([[3, 4, 5], [7, 8, 9]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = one.model().eval()
        logits = adapted(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(whole(input_ids=ids, attention_mask=mask).logits, logits)
        made = adapted.generate(
            input_ids=ids,
            attention_mask=mask,
            min_new_tokens=2,
            max_new_tokens=2,
            do_sample=False,
        )
        # Greedy: twice the likeliest token but the end token, 2, after all tokens so far.
        for _ in range(2):
            after = adapted(input_ids=ids).logits[:, -1].index_fill(1, torch.tensor([2]), -1e9)
            ids = torch.cat([ids, after.argmax(dim=1, keepdim=True)], dim=1)
    assert made.tolist() == ids.tolist()


def test_what_does_not_fit_is_rejected_by_plan(words):
    data = rows()
    seeing = recipe_of(recurrent()(causal=False), words)
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        rayfed_lora.plan(seeing, data=data)
    packed = seeing.with_({"model.config.causal": True, "data.packing": True})
    with pytest.raises(ModelError, match=r"data.packing: expected false with this model"):
        rayfed_lora.plan(packed, data=data)
    with pytest.raises(RecipeError, match="expected task text-classification with own model"):
        recipe_of(bag()(), words, "image-classification")
    without = load_recipe(VALUES, plugins=[bag()()])
    with pytest.raises(ModelError, match=r"model.tokenizer: expected a package, folder or hub id"):
        rayfed_lora.plan(without, data=data)
    with pytest.raises(PluginError, match=r"expected a task of image-classification, .*got 'tts'"):
        model(task="tts")


def test_a_module_whose_logits_have_another_shape_is_named_by_plan(words):
    @model("flat-of-a-test", task=TEXTS)
    def flat(vocabulary, length, classes):
        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = nn.Linear(1, classes)

            def forward(self, ids, mask):
                return self.inside((ids * mask).unsqueeze(2).float())

        return Flat()

    with pytest.raises(ModelError, match=r"expected a vector of logits for each example"):
        rayfed_lora.plan(recipe_of(flat(), words), data=rows())
