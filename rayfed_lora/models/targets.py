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

# Query and value projections by the names that transformers' models give them, and projections
# that hold them both.
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
_UNUSED = "the model never calls it"
# Names of a note at most.
_MOST_NAMED = 4


@dataclass(frozen=True)
class Targets:
    """The modules that get factors.

    Attributes:
        names: full names, in model order.
        notes: what is left out and why, one line each.
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
    """Return the modules that a recipe's `adapter.target_modules` stands for.

    Args:
        net: a plain model, with or without values.
        targets: the recipe's value.
        head: names of the modules that make up the head.
        rank: the largest rank that is trained; `all-linear` leaves smaller layers out.
        unused: linear layers that a forward pass does not call.

    Raises:
        ModelError: nothing matches, an entry of a list matches nothing that can be adapted, or
            what matches is not a linear layer.
    """
    layers = _Layers(net, tuple(head), unused)
    if targets == "auto":
        return layers.without(_query_and_value(net, layers.linear), {})
    if targets == "all-linear":
        small = {
            name: f"smaller than annealing.heating.rank {rank}"
            for name in layers.linear
            if sides(layers.outside[name]).max_rank < rank
        }
        return layers.without(layers.linear, small)
    entries = [targets] if isinstance(targets, str) else targets
    found = [name for entry in entries for name in layers.named(entry, isinstance(targets, str))]
    if not found:
        raise ModelError(f"{_KEY}: {targets!r} matches nothing; {layers.offer()}")
    chosen = layers.without([n for n in layers.outside if n in set(found)], {})
    inside = [n for n in layers.head_linear if any(_matches(t, n, targets) for t in entries)]
    notes = chosen.notes
    if inside:
        notes += (f"{_KEY}: {_listed(inside)} is part of the head and gets no factors",)
    return Targets(chosen.names, notes)


class _Layers:
    """The modules of a model as targets see them."""

    def __init__(self, net: nn.Module, head: tuple[str, ...], unused: Collection[str]) -> None:
        inside = tuple(f"{name}." for name in head)
        everything = {name: module for name, module in net.named_modules() if name}
        self.head = {n: m for n, m in everything.items() if f"{n}.".startswith(inside)}
        self.outside = {n: m for n, m in everything.items() if n not in self.head}
        self.linear = [name for name, module in self.outside.items() if is_linear(module)]
        self.head_linear = [name for name, module in self.head.items() if is_linear(module)]
        self.reasons: Mapping[str, str] = {**dict.fromkeys(unused, _UNUSED), **unsuitable(net)}

    def without(self, names: Sequence[str], reasons: Mapping[str, str]) -> Targets:
        """Leave out what cannot get factors.

        Raises:
            ModelError: nothing is left.
        """
        known = {**reasons, **self.reasons}
        kept = [name for name in names if name not in known]
        if not kept:
            raise ModelError(f"{_KEY}: {self.offer(known)}")
        left_out: dict[str, list[str]] = {}
        for name in names:
            if name in known:
                left_out.setdefault(known[name], []).append(name)
        notes = [f"{_KEY}: {_listed(n)} left out: {reason}" for reason, n in left_out.items()]
        return Targets(kept, tuple(notes))

    def named(self, entry: str, is_regex: bool) -> list[str]:
        """Return the modules that an entry names; each is linear, and one can get factors.

        Raises:
            ModelError: there are none; says why.
        """
        whole = entry if is_regex else [entry]
        found = [name for name in self.outside if _matches(entry, name, whole)]
        if not found:
            raise ModelError(f"{_KEY}: {entry!r} matches nothing{self._instead(entry, whole)}")
        other = [name for name in found if not is_linear(self.outside[name])]
        if other:
            kind = type(self.outside[other[0]]).__name__
            raise ModelError(
                f"{_KEY}: expected nn.Linear modules, {other[0]!r} is {kind}; {self.offer()}"
            )
        if all(name in self.reasons for name in found):
            raise ModelError(
                f"{_KEY}: {entry!r} matches {_listed(found)}, which cannot get factors:"
                f" {self.reasons[found[0]]}; {self.offer()}"
            )
        return found

    def _instead(self, entry: str, whole: str | list[str]) -> str:
        inside = [name for name in self.head if _matches(entry, name, whole)]
        if inside:
            return (
                f" outside of the head: {inside[0]!r} is part of the head, which gets no factors"
                f" (adapter.train_head, adapter.head_modules); {self.offer()}"
            )
        endings = {*_endings(self.linear), *(name.rpartition(".")[2] for name in self.linear)}
        near = difflib.get_close_matches(entry, sorted({*endings, "auto", "all-linear"}), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"{hint}; {self.offer()}"

    def offer(self, known: Mapping[str, str] | None = None) -> str:
        """Say which modules there are."""
        known = self.reasons if known is None else known
        able = [name for name in self.linear if name not in known]
        if able:
            return f"the model's linear modules end in {', '.join(_endings(able))}"
        if not self.linear:
            return "factors go to nn.Linear modules, and the model has none outside of its head"
        reasons = dict.fromkeys(known[name] for name in self.linear)
        return f"no linear module of the model can get factors: {'; '.join(reasons)}"


def _query_and_value(net: nn.Module, linear: list[str]) -> list[str]:
    ending = {name: name.rpartition(".")[2] for name in linear}
    for pair in _QUERY_VALUE:
        found = [name for name in linear if ending[name] in pair]
        if {ending[name] for name in found} == set(pair):
            return found
    for joint in _JOINT:
        found = [name for name in linear if ending[name] == joint]
        if joint == "in_proj":
            # State-space models give this name to something else.
            found = [n for n in found if _is_threefold(net.get_submodule(n))]
        if found:
            return found
    offer = f"the model's linear modules end in {', '.join(_endings(linear))}"
    none = "factors go to nn.Linear modules, and the model has none outside of its head"
    raise ModelError(
        f"{_KEY}: auto finds no query and value projections; {offer if linear else none}"
    )


def _is_threefold(module: nn.Module) -> bool:
    shape = sides(module)
    return shape.d_out == 3 * shape.d_in


def _matches(entry: str, name: str, targets: str | Sequence[str]) -> bool:
    """Return whether an entry of a list, or the one regex, names a module."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(entry, name) is not None
        except re.error as error:
            raise ModelError(f"{_KEY}: {entry!r} is no regex: {error}") from None
    return name == entry or name.endswith(f".{entry}")


def _endings(names: Iterable[str]) -> list[str]:
    """Return the names behind the last index of a layer, each once."""
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names))


def _listed(names: Sequence[str]) -> str:
    endings = _endings(names)
    more = f" and {len(endings) - _MOST_NAMED} more" if len(endings) > _MOST_NAMED else ""
    count = "" if len(names) == len(endings) else f" ({len(names)} modules)"
    return f"{', '.join(endings[:_MOST_NAMED])}{more}{count}"
