"""The simulated devices and network of clients: sections of the recipe. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue

from rayfed_lora.recipe.fields import Fraction, NonNegative, PositiveFloat, Section, option


class Spread(Section):
    """A positive number that differs between clients. A plain number stands for `median`."""

    distribution: Literal["lognormal", "uniform"] = option(
        "lognormal", "lognormal: median * exp(sigma * normal) | uniform: between low and high"
    )
    median: PositiveFloat | None = option(None, "the middle of all clients (lognormal)")
    sigma: Annotated[float, Field(ge=0.0, le=10.0)] = option(
        0.0, "spread of the logarithm (lognormal); 0: the same for all"
    )
    low: PositiveFloat | None = option(None, "smallest value (uniform)")
    high: PositiveFloat | None = option(None, "largest value (uniform)")
    column: str | None = option(
        None, "column of the data to use instead: the mean over a client's examples"
    )


class Availability(Section):
    """When clients can be reached. A number stands for `dropout`, a text for `trace`."""

    dropout: Fraction = option(0.0, "probability that a client leaves during a round")
    trace: str | None = option(
        None,
        "file (.csv, .parquet, .jsonl, .arrow) of the times at which each client can be reached,"
        " with columns client (its value in `data.partition.column`, else its number from 0),"
        " start_s, end_s; a client without a row never can",
    )
    period_s: PositiveFloat | None = option(
        None, "period after which the trace repeats; null: never", "s"
    )


def short_for(stands_for: Mapping[type, str]) -> Any:
    """Return a validator that lets a plain value stand for one key of a section.

    Args:
        stands_for: key by type of the value.
    """

    def expanded(value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        key = stands_for.get(float if number else type(value))
        return value if key is None else {key: value}

    return BeforeValidator(expanded)


_NUMBER: dict[str, JsonValue] = {"type": "number", "exclusiveMinimum": 0}
OwnNumber = Annotated[Spread | None, short_for({float: "median"})]


def own_number(description: str, unit: str) -> Any:
    """Return a field of a number that differs between clients; null by default."""

    def with_number(schema: dict[str, Any]) -> None:
        schema["anyOf"].append(_NUMBER)
        schema["unit"] = unit

    return Field(None, description=description, json_schema_extra=with_number)


def also_plain(schema: dict[str, Any], *types: str) -> None:
    """Let a section's schema accept plain values of these types too."""
    schema["anyOf"] = [{"$ref": schema.pop("$ref")}, *({"type": kind} for kind in types)]


class Network(Section):
    """The simulated network between the server and its clients."""

    up_mbps: OwnNumber = own_number("bandwidth of uploads; null: they take no time", "Mbit/s")
    down_mbps: OwnNumber = own_number("bandwidth of downloads; null: they take no time", "Mbit/s")
    latency_s: NonNegative = option(0.0, "added to each message", "s")
