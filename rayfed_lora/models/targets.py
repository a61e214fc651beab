"""Which linear layers of a model get factors. Source: this project; name matching as in PEFT."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.linear import is_linear, sides, unsuitable
from rayfed_lora.models.wording import listed

# Names of query and value projections in transformers' models, pair by pair, and of joint ones.
_QUERY = ("q_proj", "query", "q_lin", "q", "query_proj", "q_head", "Wq")
_VALUE = ("v_proj", "value", "v_lin", "v", "value_proj", "v_head", "Wv")
_JOINT = ("query_key_value", "Wqkv", "qkv_proj", "qkv", "c_attn", "in_proj")
_KEY = "adapter.target_modules"


@dataclass(frozen=True)
class Targets:
    """Full names of the modules that get factors, in model order, and notes on the others."""

    names: list[str]
    notes: tuple[str, ...] = ()


def choose_targets(
    net: nn.Module,
    targets: str | Sequence[str],
    head: Iterable[str],
    *,
    rank: int = 0,
    unused: Collection[str] = (),
) -> Targets:
    """Return the modules that a recipe's `adapter.target_modules` selects.

    `all-linear` leaves out layers smaller than `rank`, the largest trained one. `unused` are linear
    layers that a forward pass does not call. The model may be on the meta device.

    Raises:
        ModelError: nothing matches, an entry of a list matches nothing that can be adapted, or
            a match is not a linear layer.
    """
    layers = _Layers(net, tuple(head), unused)
    if targets == "auto":
        return layers.usable(layers.query_and_value())
    if targets == "all-linear":
        small = [name for name in layers.linear if sides(layers.body[name]).max_rank < rank]
        reason = f"smaller than annealing.heating.rank {rank}"
        return layers.usable(layers.linear, dict.fromkeys(small, reason))
    entries = [targets] if isinstance(targets, str) else targets
    patterns = {entry: _pattern(entry, isinstance(targets, str)) for entry in entries}
    found = {n for entry, pattern in patterns.items() for n in layers.named(entry, pattern)}
    if not found:
        raise ModelError(f"{_KEY}: {targets!r} matches nothing; {layers.offer()}")
    chosen = layers.usable([name for name in layers.body if name in found])
    linear = [name for name, module in layers.head.items() if is_linear(module)]
    in_head = [n for n in linear if any(pattern.fullmatch(n) for pattern in patterns.values())]
    if not in_head:
        return chosen
    note = f"{_KEY}: {_grouped(in_head)} is part of the head and gets no factors"
    return Targets(chosen.names, (*chosen.notes, note))


class _Layers:
    """The modules of a model by name, split into head and body; `linear` are in the body."""

    def __init__(self, net: nn.Module, head: tuple[str, ...], unused: Collection[str]) -> None:
        inside = tuple(f"{name}." for name in head)
        modules = {name: module for name, module in net.named_modules() if name}
        self.head = {n: m for n, m in modules.items() if f"{n}.".startswith(inside)}
        self.body = {n: m for n, m in modules.items() if n not in self.head}
        self.linear = [name for name, module in self.body.items() if is_linear(module)]
        unused_reasons = dict.fromkeys(unused, "the model never calls it")
        self._reasons: Mapping[str, str] = {**unused_reasons, **unsuitable(net)}

    def query_and_value(self) -> list[str]:
        """Return the query and value projections, or the joint ones."""
        ending = {name: name.rpartition(".")[2] for name in self.linear}
        for pair in zip(_QUERY, _VALUE, strict=True):
            found = [name for name in self.linear if ending[name] in pair]
            if {ending[name] for name in found} == set(pair):
                return found
        for joint in _JOINT:
            found = [name for name in self.linear if ending[name] == joint]
            if joint == "in_proj":
                # State-space models use this name for another projection.
                shapes = {name: sides(self.body[name]) for name in found}
                found = [name for name, shape in shapes.items() if shape.d_out == 3 * shape.d_in]
            if found:
                return found
        raise ModelError(f"{_KEY}: auto finds no query and value projections; {self.offer()}")

    def usable(self, names: Sequence[str], small: Mapping[str, str] | None = None) -> Targets:
        """Return the layers that can get factors, with notes on the others; `small` cannot."""
        reasons = {**(small or {}), **self._reasons}
        kept = [name for name in names if name not in reasons]
        if not kept:
            raise ModelError(f"{_KEY}: {self.offer(reasons)}")
        left_out: dict[str, list[str]] = {}
        for name in names:
            if name in reasons:
                left_out.setdefault(reasons[name], []).append(name)
        notes = [f"{_KEY}: {_grouped(n)} left out: {reason}" for reason, n in left_out.items()]
        return Targets(kept, tuple(notes))

    def named(self, entry: str, pattern: re.Pattern[str]) -> list[str]:
        """Return the modules that an entry names; all are linear, and at least one is usable."""
        found = list(filter(pattern.fullmatch, self.body))
        if not found:
            raise ModelError(f"{_KEY}: {entry!r} matches nothing{self._instead(entry, pattern)}")
        other = [name for name in found if not is_linear(self.body[name])]
        if other:
            kind = type(self.body[other[0]]).__name__
            raise ModelError(
                f"{_KEY}: expected nn.Linear modules, {other[0]!r} is {kind}; {self.offer()}"
            )
        if all(name in self._reasons for name in found):
            raise ModelError(
                f"{_KEY}: {entry!r} matches {_grouped(found)}, which cannot get factors:"
                f" {self._reasons[found[0]]}; {self.offer()}"
            )
        return found

    def _instead(self, entry: str, pattern: re.Pattern[str]) -> str:
        in_head = list(filter(pattern.fullmatch, self.head))
        if in_head:
            return (
                f" outside of the head: {in_head[0]!r} is part of the head, which gets no factors"
                f" (adapter.train_head, adapter.head_modules); {self.offer()}"
            )
        last = {name.rpartition(".")[2] for name in self.linear}
        known = sorted({*_endings(self.linear), *last, "auto", "all-linear"})
        near = difflib.get_close_matches(entry, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{hint}; {self.offer()}"

    def offer(self, reasons: Mapping[str, str] | None = None) -> str:
        """Return which modules can get factors, or why none can, for messages."""
        reasons = self._reasons if reasons is None else reasons
        able = [name for name in self.linear if name not in reasons]
        if able:
            return f"the model's linear modules end in {', '.join(_endings(able))}"
        if not self.linear:
            return "factors go to nn.Linear modules, and the model has none outside of its head"
        distinct = dict.fromkeys(reasons[name] for name in self.linear)
        return f"no linear module of the model can get factors: {'; '.join(distinct)}"


def _pattern(entry: str, is_regex: bool) -> re.Pattern[str]:
    """Return what a whole name has to match: the one regex, or an ending after a dot."""
    try:
        return re.compile(entry if is_regex else rf"(?:.*\.)?{re.escape(entry)}")
    except re.error as error:
        raise ModelError(f"{_KEY}: {entry!r} is no regex: {error}") from None


def _endings(names: Iterable[str]) -> list[str]:
    """Return the distinct parts of names behind the last layer index."""
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names))


def _grouped(names: Sequence[str]) -> str:
    endings = _endings(names)
    count = "" if len(names) == len(endings) else f" ({len(names)} modules)"
    return f"{listed(endings)}{count}"
