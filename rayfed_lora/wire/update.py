"""A method of the kind `update` as one object: codecs and attacks.

A built-in method is a file of `built_in`; a plug-in's is a decorated function or frozen dataclass.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rayfed_lora.errors import RunError
from rayfed_lora.plugins.tables import UPDATES
from rayfed_lora.types import FloatArray

# Of one client's tensors, by name.
Shapes = Mapping[str, tuple[int, ...]]
# (clients, ...) by name.
Stacked = Mapping[str, FloatArray]
BYTES_PER_VALUE = 4


@dataclass(frozen=True, kw_only=True)
class UpdateMethod:
    """A codec, which has a `size`, or an attack, which has none.

    Attributes:
        name: its value in a recipe.
        source: arXiv number.
        summary: one line.
        target: the decorated function or class.
        options: of the function, or fields of the class.
        declared: computes the bytes of one client's message from the shapes of its tensors and the
            options; None: the class's own `size`, or no codec.
        stacked: whether it gets the tensors of several clients at once.
        acts_on: `tensors` of an update, or the `labels` of a client's examples.
        down: whether it can encode a state, which a download is, beside an update.
        lossless: whether the receiver sees the very float32 values.
    """

    name: str
    source: str
    summary: str
    target: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    declared: Callable[..., int] | None = None
    stacked: bool = False
    acts_on: Literal["tensors", "labels"] = "tensors"
    down: bool = True
    lossless: bool = False

    @property
    def is_codec(self) -> bool:
        """Whether it has a size, and so can be named by `wire`."""
        return self.declared is not None or hasattr(self.target, "size")

    @property
    def key(self) -> str:
        """The key of a recipe that names it, if it is given as an object."""
        return "wire.up.name" if self.is_codec else "clients.attack.name"

    def with_options(self, options: Mapping[str, Any]) -> UpdateMethod:
        """Return the method with options of its function or fields of its class."""
        return replace(self, options=dict(options))

    @cached_property
    def _call(self) -> Any:
        if isinstance(self.target, type):
            return self.target(**self.options)
        return partial(self.target, **self.options)

    def size(self, shapes: Shapes) -> int:
        """Return the bytes of one client's message of tensors of these shapes."""
        if self.lossless:
            return BYTES_PER_VALUE * sum(map(math.prod, shapes.values()))
        if self.declared is not None:
            return int(self.declared(shapes, **self.options))
        return int(self._call.size(shapes))

    def labels(self, labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
        """Return the labels that a malicious client trains with.

        Raises:
            RunError: they are no classes.
        """
        found = np.asarray(self._call(labels, classes))
        valid = found.shape == labels.shape and found.dtype.kind == "i"
        if not valid or (found < 0).any() or (found >= classes).any():
            raise RunError(
                f"update {self.name!r}: expected {len(labels)} integer labels from 0 to"
                f" {classes - 1}, got {found.dtype} of {found.shape}"
            )
        return found.astype(np.int64)

    def seen(
        self,
        tensors: Stacked,
        rngs: Sequence[np.random.Generator],
        round_index: int,
        clients: Sequence[int],
    ) -> Stacked:
        """Return what the receiver sees of some clients' tensors, checked.

        Args:
            tensors: (clients, ...) float32 by name.
            rngs: a generator for each client.
            round_index: for errors.
            clients: ids, for errors; -1: the server.

        Raises:
            RunError: the method raised, or what it returned does not fit.
        """
        if self.lossless:
            return tensors
        if self.stacked:
            return self._seen(tensors, rngs, tensors, round_index, clients)
        parts = []
        for i, (client, rng) in enumerate(zip(clients, rngs, strict=True)):
            one = {name: tensor[i] for name, tensor in tensors.items()}
            like = {name: tensor[i : i + 1] for name, tensor in tensors.items()}
            parts.append(self._seen(one, rng, like, round_index, [client]))
        return {name: np.concatenate([part[name] for part in parts]) for name in tensors}

    def _seen(
        self,
        given: Mapping[str, FloatArray],
        rng: Any,
        like: Stacked,
        round_index: int,
        clients: Sequence[int],
    ) -> Stacked:
        who = "the download" if list(clients) == [-1] else f"client {clients[0]}"
        others = f" and {len(clients) - 1} more" if len(clients) > 1 else ""
        where = f"update {self.name!r}, round {round_index + 1}, {who}{others}"
        try:
            found = self._call(given, rng)
        except Exception as error:
            raise RunError(f"{where}: it raised\n{traceback.format_exc().rstrip()}") from error
        sent = None
        if isinstance(found, tuple) and len(found) == 2:
            found, sent = found
        tensors = _fitting(where, found, like)
        declared = self.size({n: t.shape[1:] for n, t in like.items()}) if self.is_codec else None
        if self.is_codec and sent != declared:
            raise RunError(
                f"{where}: expected (tensors, bytes of a client's message) with the declared size,"
                f" {declared} bytes, got {sent}"
            )
        return tensors


def _fitting(where: str, found: Any, like: Stacked) -> Stacked:
    """Return a method's tensors with a first axis of clients; RunError where they do not fit."""
    if not isinstance(found, Mapping) or set(found) != set(like):
        got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise RunError(f"{where}: expected a mapping with the tensors {sorted(like)}, got {got}")
    tensors = {}
    for name, old in like.items():
        tensor = np.asarray(found[name])
        if tensor.dtype != np.float32 or tensor.shape not in (old.shape, old.shape[1:]):
            raise RunError(
                f"{where}, tensor {name!r}: expected float32 of shape {old.shape}, got"
                f" {tensor.dtype} of {tensor.shape}"
            )
        if not np.isfinite(tensor).all():
            raise RunError(f"{where}, tensor {name!r}: expected finite values")
        tensors[name] = tensor.reshape(old.shape)
    return tensors


def update(
    name: str | None = None,
    *,
    summary: str | None = None,
    source: str = "",
    size: Callable[..., int] | None = None,
    **facts: Any,
) -> Callable[[Any], Any]:
    """Register a codec or an attack: a function, or a frozen dataclass that is called like it.

    It gets the tensors that one client sends, by name (float32; trained minus received; for the
    codec of the download the state itself), and a numpy generator keyed by run, method, round and
    client. An attack returns the tensors that the client sends instead. A codec returns what the
    receiver sees and the bytes of the message, which its `size` must declare: a function of the
    shapes, by name, and the options; or the class's method `size(shapes)`. With `stacked=True`
    tensors have a first axis of clients, and there is a list of generators. With
    `acts_on="labels"` it gets (labels, number of classes) and returns labels.

    Args:
        name: its value in recipes; default: the function's or class's, with hyphens.
        summary: one line; default: the first one of the docstring.
        source: arXiv number.
        size: computes the bytes of one client's message.
        facts: other attributes of `UpdateMethod`.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """

    def register(target: Any) -> Any:
        def value(own: str) -> UpdateMethod:
            first = (target.__doc__ or "").strip().partition("\n")[0]
            return UpdateMethod(
                name=own,
                source=source,
                summary=summary or first,
                target=target,
                declared=size,
                **facts,
            )

        return UPDATES.add(target, name, value=value, bind=UpdateMethod.with_options)

    return register
