"""Texts to tokens, in runs of bounded size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rayfed_lora.models import tokens

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "b"]
TEXTS = ["a b a", "b", "a a a a a a a", "a b", "", "b b b b"]
# [CLS] text [SEP], at most 6 tokens, [PAD] behind the shorter ones
ROWS = [
    [1, 4, 5, 4, 2, 3],
    [1, 5, 2, 3, 3, 3],
    [1, 4, 4, 4, 4, 2],
    [1, 4, 5, 2, 3, 3],
    [1, 2, 3, 3, 3, 3],
    [1, 5, 5, 5, 5, 2],
]


@pytest.fixture
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("characters", [1, 6, 1_000_000])
def test_texts_have_the_same_tokens_however_they_are_cut_into_runs(
    characters, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", characters)
    found = tokens.tokenize(tokenizer, TEXTS, 6)
    assert found["input_ids"].tolist() == ROWS
    assert found["attention_mask"].tolist() == [[int(i != 3) for i in row] for row in ROWS]
    assert all(values.dtype == np.int32 for values in found.values())
    whole = tokens.tokenize_whole(tokenizer, TEXTS, 6)
    # this one pads with 0, and cuts what is too long behind its sixth token
    cut = [[i if i != 3 else 0 for i in row] for row in ROWS]
    cut[2] = [1, 4, 4, 4, 4, 4]
    assert whole["input_ids"].tolist() == cut


def test_a_run_has_no_more_characters_than_it_may_but_for_a_single_text(monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 4)
    runs = list(tokens._batches(["aa", "aa", "a", "aaaaaa", "aaa", "a"]))
    assert runs == [["aa", "aa"], ["a"], ["aaaaaa"], ["aaa", "a"]]
