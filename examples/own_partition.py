"""A partition: who holds which example. Here the first clients hold far more than the last ones."""

import numpy as np

import rayfed_lora
from rayfed_lora.plugins import partition


@partition()
def zipf(labels, clients, rng, *, power: float = 1.0):
    """Client k holds a share in proportion to 1 / (k + 1) ** power, at least one example."""
    weights = 1.0 / np.arange(1, clients + 1) ** power
    rest = rng.choice(clients, len(labels) - clients, p=weights / weights.sum())
    return rng.permutation(np.concatenate([np.arange(clients), rest]))


if __name__ == "__main__":
    result = rayfed_lora.run("examples/small.yaml", plugins=[zipf(power=1.5)])
    print(result.clients.groupby("client")["examples"].first().to_dict())
