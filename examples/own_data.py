"""Own rows from a function with options: noisy rings of numbers, trained by an own module."""

import numpy as np
import pandas as pd
from torch import nn

import rayfed_lora
from rayfed_lora.plugins import data, model


@data()
def rings(rng, *, rows: int = 600, noise: float = 0.2):
    """Points on two circles; the label says on which one. Numbers are images of one line."""
    label = np.arange(rows) % 2
    angle, radius = rng.uniform(0, 2 * np.pi, rows), 1.0 + label
    points = radius * np.array([np.cos(angle), np.sin(angle)]) + rng.normal(0, noise, (2, rows))
    return pd.DataFrame({"image": [point[None] for point in points.T], "label": label})


@model()
def perceptron(channels, height, width, classes, *, hidden: int = 32):
    """Three linear layers; `net.3` gets the factors, `net.5` is the head."""
    first, inside = nn.Linear(channels * height * width, hidden), nn.Linear(hidden, hidden)
    last = nn.Linear(hidden, classes)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), inside, nn.ReLU(), last)


if __name__ == "__main__":
    chosen = [rings(noise=0.3), perceptron()]
    recipe = rayfed_lora.Recipe.load("examples/small.yaml", plugins=chosen).with_(
        {"adapter.target_modules": ["net.3"], "data.partition.kind": "iid"}
    )
    result = rayfed_lora.run(recipe)
    print(result.rounds[["round", "stage", "rank", "eval_accuracy"]])
