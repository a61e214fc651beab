"""Rows of a pandas DataFrame: here the images of scikit-learn's digits, 360 of them for tests."""

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

import rayfed_lora

if __name__ == "__main__":
    digits = load_digits()
    pixels = np.minimum(digits.images * 16, 255).astype(np.uint8)
    frame = pd.DataFrame({"image": list(pixels), "label": digits.target})
    frame["writer"] = np.arange(len(frame)) // 150  # a client for each 150 rows
    recipe = rayfed_lora.Recipe.load("examples/small.yaml").with_(
        {
            "data.partition": {"kind": "column", "column": "writer"},
            "annealing.initiating.rounds": 2,
            "annealing.heating.rounds": 1,
        }
    )
    result = rayfed_lora.run(recipe, data=(frame[:-360], frame[-360:]))
    print(result.clients.groupby("client_name")["examples"].first())
