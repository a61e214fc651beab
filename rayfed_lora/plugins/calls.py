"""Calls of own methods: what they raise names the method and the round. Source: this project."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rayfed_lora.errors import RayfedError, RunError
from rayfed_lora.plugins.registry import Kind


@contextmanager
def own_method(kind: Kind, name: str, round_index: int) -> Iterator[None]:
    """Turn whatever a method raises, or a check of its result, into a RunError that names it."""
    try:
        yield
    except RayfedError:
        raise
    except Exception as error:
        raise RunError(
            f"{kind} {name!r} failed in round {round_index + 1}:\n{traceback.format_exc()}"
        ) from error
