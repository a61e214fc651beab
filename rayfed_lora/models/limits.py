"""Limits on the size of a model, checked before and while it is built without weights.

Source: this project.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from rayfed_lora.errors import ModelError
from rayfed_lora.models.wording import where
from rayfed_lora.recipe.model import Model
from rayfed_lora.units import megabytes

# 4 TB in float32, which every client actor holds.
MOST_PARAMETERS = 10**12
# Building a module takes 20 to 100 us, whatever its size.
MOST_MODULES = 200_000
# A configuration may list its layers, and a model the sizes of its tensors, one by one.
_MOST_LAYERS, _MOST_VALUE = 10_000, 10**8
_COUNTS = re.compile(r"(n|num|encoder|decoder)_(.*_)?(layers?|blocks|stages|experts|heads)|depths?")
_BYTES = 4


def check_numbers(values: Mapping[str, Any], subject: str) -> None:
    """Raise ModelError for a size that would take too long to build, before anything is built.

    Also for a dropout rate that is none: attention on the meta device takes any.

    Args:
        values: entries of a configuration, nested ones too.
        subject: where they come from, for the message.
    """
    for path, value in _numbers(values):
        key = path.rpartition(".")[2]
        least, most = -float("inf"), float(_MOST_VALUE)
        if "drop" in key:
            least, most = 0, 1
        elif _COUNTS.fullmatch(key):
            least, most = 0, _MOST_LAYERS
        elif isinstance(value, float) or "theta" in key:  # rope_theta is a frequency
            continue
        if not least <= value <= most:
            start = "at most" if math.isinf(least) else f"{least} to"
            raise ModelError(f"{subject}.{path}: expected {start} {most:,.0f}, got {value:,}")


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _numbers(value, path)
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield path, values


@contextmanager
def few_modules(subject: str) -> Iterator[None]:
    """Stop with a ModelError if this thread builds more than `MOST_MODULES` modules."""
    thread, built = get_ident(), 0

    def count(*_: object) -> None:
        nonlocal built
        built += get_ident() == thread
        if built > MOST_MODULES:
            raise ModelError(
                f"{subject}: expected a model of at most {MOST_MODULES:,} modules, it has more;"
                " lower the number of layers"
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_size(net: nn.Module, model: Model, *, here: bool) -> None:
    """Raise ModelError if a weight has no values, or all of them take too much memory.

    Args:
        net: the model, on the meta device.
        model: where it comes from.
        here: compare the weights with this machine's memory too.
    """
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    empty = next((name for name, size in sizes.items() if size == 0), None)
    if empty is not None:
        shape = " x ".join(map(str, net.get_parameter(empty).shape))
        raise ModelError(f"{where(model)}: expected sizes of at least 1, {empty} is {shape}")
    total = sum(sizes.values())
    limits = {"float32 weights that an actor can hold": MOST_PARAMETERS * _BYTES}
    if here:
        limits["memory of this machine"] = memory_bytes()
    for name, limit in limits.items():
        if total * _BYTES > limit:
            largest = max(sizes, key=lambda each: sizes[each])
            shape = " x ".join(map(str, net.get_parameter(largest).shape))
            raise ModelError(
                f"{where(model)}: expected a model of at most {megabytes(limit)}, the {name}, got"
                f" {total:,} parameters of {megabytes(total * _BYTES)}; its largest weight,"
                f" {largest}, is {shape}"
            )


def memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
