"""What happens between clients and server: codecs, attacks, privacy; sections of the recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rayfed_lora.recipe.fields import (
    Choosing,
    NameIn,
    PositiveFloat,
    Section,
    also_plain,
    option,
    short_for,
)
from rayfed_lora.wire.updates import ATTACKS, CODECS, UPDATES
from rayfed_lora.wire.upload import Named


class Codec(Choosing):
    """The encoding of a message; its options stand beside `name`."""

    choice = ("name", UPDATES)

    name: Annotated[str, NameIn(CODECS)] = option(
        "float32", " | ".join(f"{name}: {codec.summary}" for name, codec in CODECS.items())
    )

    error_feedback: bool = option(
        False,
        "each client adds to its update what the codec has lost of its earlier ones (wire.up; best"
        " where all clients take part)",
    )

    @property
    def named(self) -> Named:
        """Name and options, for the parts that know no recipe."""
        return Named(self.name, self.own_options)


def _codec(description: str) -> Any:
    return Field(
        default_factory=Codec,
        description=description,
        json_schema_extra=lambda schema: also_plain(schema, "string"),
    )


class Wire(Section):
    """The codecs of messages; a text stands for the name of one."""

    up: Annotated[Codec, short_for({str: "name"})] = _codec("of each client's update")
    down: Annotated[Codec, short_for({str: "name"})] = _codec(
        "of the state that clients start from; the server keeps its own in float32"
    )


class Attack(Choosing):
    """Malicious clients; options of the attack stand beside `name`."""

    choice = ("name", UPDATES)

    name: Annotated[str, NameIn(ATTACKS)] = option(
        "sign-flip", " | ".join(f"{name}: {attack.summary}" for name, attack in ATTACKS.items())
    )
    share: Annotated[float, Field(ge=0.0, le=1.0)] = option(
        0.2, "share of all clients that are malicious, drawn from the seed once a run"
    )

    @property
    def named(self) -> Named:
        """Name and options, for the parts that know no recipe."""
        return Named(self.name, self.own_options)


class Privacy(Section):
    """Client-level differential privacy by a trusted server; clients then count the same."""

    clip: PositiveFloat = Field(description="largest 2-norm of a client's whole update")
    noise_multiplier: PositiveFloat = Field(
        description="standard deviation of the noise on the sum of updates, in units of clip"
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="delta of (epsilon, delta); well below 1 / number of clients"
    )
    sampling: Literal["fixed", "poisson"] = option(
        "fixed",
        "fixed: per_round clients without replacement, epsilon for one client replaced by another"
        " | poisson: each client with probability per_round / clients, epsilon for one client added"
        " or removed",
    )
