"""An own sampler: clients that have not taken part for long come first, large ones before small."""

import numpy as np

import rayfed_lora
from rayfed_lora.plugins import sampler


@sampler()
def longest_away(pool, wanted, history, rng):
    """Return the clients whose last round is longest ago; ties by size."""
    order = np.lexsort((-history.examples[pool], history.rounds[pool]))
    return pool[order[:wanted]]


if __name__ == "__main__":
    result = rayfed_lora.run("examples/small.yaml", plugins=[longest_away()])
    print(result.clients.groupby("round")["client"].apply(list))
