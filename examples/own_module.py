"""An own nn.Module for images, trained as the full model first and then by LoRA."""

from torch import nn

import rayfed_lora
from rayfed_lora.plugins import model


@model()
def small_mlp(channels, height, width, classes, *, hidden: int = 64):
    """Two linear layers; `net.1` gets the factors, `net.3` is the head."""
    pixels = channels * height * width
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


if __name__ == "__main__":
    recipe = rayfed_lora.Recipe.load("examples/small.yaml", plugins=[small_mlp]).with_(
        {"model": {"source": "small-mlp", "hidden": 128}, "adapter.target_modules": ["net.1"]}
    )
    result = rayfed_lora.run(recipe, plugins=[small_mlp])
    print(result.rounds[["round", "stage", "rank", "eval_accuracy"]])
    print(result.model())
