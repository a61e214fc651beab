"""An own cooling curve: the rank falls in teeth of a saw."""

from typing import Annotated

from pydantic import Field

import rayfed_lora
from rayfed_lora.plugins import shape


@shape()
def saw(start, end, u, *, teeth: Annotated[int, Field(ge=1)] = 3):
    """Fall from start to end in each tooth."""
    place = u * teeth % 1.0
    return start + (end - start) * (place or 1.0)


if __name__ == "__main__":
    recipe = rayfed_lora.load_recipe(
        "examples/small.yaml", {"annealing.cooling.rounds": 6}, plugins=[saw(teeth=2)]
    )
    print([planned.rank for planned in rayfed_lora.plan(recipe).rounds])
