"""An own acceptance rule: a lower rank is taken while the validation loss rises by little."""

import rayfed_lora
from rayfed_lora.plugins import acceptance


@acceptance(needs="energies")
def gentle(offer, *, most: float = 0.02):
    """Accept the proposed rank where the cut costs at most `most` nats."""
    cost = offer.energy_proposed - offer.energy_current
    return offer.proposed if cost <= most else offer.rank


if __name__ == "__main__":
    result = rayfed_lora.run("examples/small.yaml", plugins=[gentle(most=0.01)])
    print(result.rounds[["round", "stage", "rank", "eval_accuracy"]])
