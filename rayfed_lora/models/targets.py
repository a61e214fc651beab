"""Which linear layers of a model get factors.

Source: this project; name matching as in PEFT (a name ending after a dot, or one full match).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.linear import is_linear, sides, unsuitable
from rayfed_lora.models.wording import listed

# Names of query and value projections in transformers' models, then those of joint projections.
_QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("query_proj", "value_proj"),
    ("q_head", "v_head"),
    ("Wq", "Wv"),
)
_JOINT = ("query_key_value", "Wqkv", "qkv_proj", "qkv", "c_attn", "in_proj")
_KEY = "adapter.target_modules"


@dataclass(frozen=True)
class Targets:
    """The modules that get factors.

    Attributes:
        names: full names, in model order.
        notes: which modules are left out and why, one line each.
    """

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

    Args:
        net: a plain model, real or on the meta device.
        targets: the recipe's value.
        head: names of the modules that make up the head.
        rank: the largest rank that is trained; `all-linear` leaves smaller layers out.
        unused: linear layers that a forward pass does not call.

    Raises:
        ModelError: nothing matches, an entry of a list matches nothing that can be adapted, or
            a match is not a linear layer.
    """
    layers = _Layers(net, tuple(head), unused)
    if targets == "auto":
        return layers.usable(layers.query_and_value())
    if targets == "all-linear":
        small = {
            name: f"smaller than annealing.heating.rank {rank}"
            for name in layers.linear
            if sides(layers.body[name]).max_rank < rank
        }
        return layers.usable(layers.linear, small)
    is_regex = isinstance(targets, str)
    entries = [targets] if isinstance(targets, str) else targets
    found = {name for entry in entries for name in layers.named(entry, is_regex)}
    if not found:
        raise ModelError(f"{_KEY}: {targets!r} matches nothing; {layers.offer()}")
    chosen = layers.usable([name for name in layers.body if name in found])
    in_head = [
        name
        for name, module in layers.head.items()
        if is_linear(module) and any(_matches(entry, name, is_regex) for entry in entries)
    ]
    if not in_head:
        return chosen
    note = f"{_KEY}: {_grouped(in_head)} is part of the head and gets no factors"
    return Targets(chosen.names, (*chosen.notes, note))


class _Layers:
    """The modules of a model, split into head and body.

    Attributes:
        head: the modules of the head, by name.
        body: all others.
        linear: names of the body's linear layers.
    """

    def __init__(self, net: nn.Module, head: tuple[str, ...], unused: Collection[str]) -> None:
        inside = tuple(f"{name}." for name in head)
        modules = {name: module for name, module in net.named_modules() if name}
        self.head = {n: m for n, m in modules.items() if f"{n}.".startswith(inside)}
        self.body = {n: m for n, m in modules.items() if n not in self.head}
        self.linear = [name for name, module in self.body.items() if is_linear(module)]
        unused_reasons = dict.fromkeys(unused, "the model never calls it")
        self._reasons: Mapping[str, str] = {**unused_reasons, **unsuitable(net)}

    def query_and_value(self) -> list[str]:
        """Return the query and value projections, or the joint ones.

        Raises:
            ModelError: the model has no such names.
        """
        ending = {name: name.rpartition(".")[2] for name in self.linear}
        for pair in _QUERY_VALUE:
            found = [name for name in self.linear if ending[name] in pair]
            if {ending[name] for name in found} == set(pair):
                return found
        for joint in _JOINT:
            found = [name for name in self.linear if ending[name] == joint]
            if joint == "in_proj":
                # State-space models use this name for another projection.
                found = [name for name in found if _is_threefold(self.body[name])]
            if found:
                return found
        raise ModelError(f"{_KEY}: auto finds no query and value projections; {self.offer()}")

    def usable(self, names: Sequence[str], small: Mapping[str, str] | None = None) -> Targets:
        """Return those of some linear layers that can get factors, with notes on the others.

        Layers in `small` cannot, for the reason given there.

        Raises:
            ModelError: none can.
        """
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

    def named(self, entry: str, is_regex: bool) -> list[str]:
        """Return the modules that an entry names; all are linear, and at least one is usable.

        Raises:
            ModelError: there are none, with the reason.
        """
        found = [name for name in self.body if _matches(entry, name, is_regex)]
        if not found:
            raise ModelError(f"{_KEY}: {entry!r} matches nothing{self._instead(entry, is_regex)}")
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

    def _instead(self, entry: str, is_regex: bool) -> str:
        in_head = [name for name in self.head if _matches(entry, name, is_regex)]
        if in_head:
            return (
                f" outside of the head: {in_head[0]!r} is part of the head, which gets no factors"
                f" (adapter.train_head, adapter.head_modules); {self.offer()}"
            )
        endings = {*_endings(self.linear), *(name.rpartition(".")[2] for name in self.linear)}
        near = difflib.get_close_matches(entry, sorted({*endings, "auto", "all-linear"}), n=1)
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


def _is_threefold(module: nn.Module) -> bool:
    shape = sides(module)
    return shape.d_out == 3 * shape.d_in


def _matches(entry: str, name: str, is_regex: bool) -> bool:
    """Return whether an entry of a list, or the one regex, names a module."""
    if not is_regex:
        return name == entry or name.endswith(f".{entry}")
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise ModelError(f"{_KEY}: {entry!r} is no regex: {error}") from None


def _endings(names: Iterable[str]) -> list[str]:
    """Return the distinct parts of names behind the last layer index."""
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names))


def _grouped(names: Sequence[str]) -> str:
    endings = _endings(names)
    count = "" if len(names) == len(endings) else f" ({len(names)} modules)"
    return f"{listed(endings)}{count}"
