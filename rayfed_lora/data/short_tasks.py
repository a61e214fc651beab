"""Short tasks of six domains, as instructions with their answers. Source: this project."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta

import pyarrow as pa

from rayfed_lora.data.raw_tables import RawData
from rayfed_lora.errors import DataError

_WORDS = (
    "apple bread cloud drum eagle flute grape horse island jacket kettle lemon mirror needle ocean"
    " pencil queen river saddle tiger umbrella violin window yellow zebra button candle donkey"
    " engine feather garden hammer insect jungle ladder market nephew orange pepper rabbit silver"
    " tunnel valley walnut basket cotton desert finger guitar helmet"
).split()
# There are no more lists of numbers.
_MOST = 300
_Task = Callable[[random.Random], tuple[str, str]]


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 49), rng.randint(2, 49)
    return f"Add the numbers {a} and {b}.", str(a + b)


def _date(rng: random.Random) -> tuple[str, str]:
    day = date(1990, 1, 1) + timedelta(days=rng.randrange(14_000))
    return f"Write {day.day} {day:%B} {day.year} as an ISO date.", day.isoformat()


def _capitals(rng: random.Random) -> tuple[str, str]:
    two = rng.sample(_WORDS, 2)
    return f"Write in capital letters: {' '.join(two)}", " ".join(two).upper()


def _count(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(_WORDS, rng.randint(2, 7))
    return f"How many words are here? {' '.join(words)}", str(len(words))


def _range(rng: random.Random) -> tuple[str, str]:
    first = rng.randint(1, 60)
    last = first + rng.randint(2, 6)
    numbers = ", ".join(map(str, range(first, last + 1)))
    return f"List the whole numbers from {first} to {last}.", numbers


def _second(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(_WORDS, 4)
    return f"Which word comes second? {' '.join(words)}", words[1]


_DOMAINS: dict[str, _Task] = {
    "addition": _sum,
    "dates": _date,
    "capitals": _capitals,
    "counting": _count,
    "numbers": _range,
    "order": _second,
}


def read_short_tasks(train: int, test: int) -> RawData:
    """Return tables of `domain`, `instruction` and `output`, always the same rows.

    `train` and `test` are the numbers of tasks of each domain; no instruction is there twice.
    """
    if train + test > _MOST:
        raise DataError(
            f"data.source 'short-tasks': expected train + test of at most {_MOST} tasks a domain,"
            f" got {train} + {test}"
        )
    tables: tuple[dict[str, list[str]], ...] = tuple(
        {"domain": [], "instruction": [], "output": []} for _ in range(2)
    )
    for domain, task in _DOMAINS.items():
        rng, seen = random.Random(domain), dict[str, str]()
        while len(seen) < train + test:
            instruction, output = task(rng)
            seen.setdefault(instruction, output)
        for i, (instruction, output) in enumerate(seen.items()):
            table = tables[0 if i < train else 1]
            for name, value in (
                ("domain", domain),
                ("instruction", instruction),
                ("output", output),
            ):
                table[name].append(value)
    return RawData(pa.table(tables[0]), pa.table(tables[1]))
