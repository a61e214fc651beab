"""An own metric: a column of rounds.parquet and of the summary."""

import numpy as np

import rayfed_lora
from rayfed_lora.plugins import joined, metric


@metric()
def balanced_accuracy(parts):
    """Return the mean over classes of the share of correct predictions."""
    whole = joined(parts)
    right = whole.classes == whole.labels
    return np.mean([right[whole.labels == c].mean() for c in np.unique(whole.labels)])


if __name__ == "__main__":
    recipe = rayfed_lora.load_recipe(
        "examples/small.yaml",
        {"evaluation.metrics": ["balanced_accuracy"]},
        plugins=[balanced_accuracy],
    )
    print(rayfed_lora.run(recipe).summary["final"])
