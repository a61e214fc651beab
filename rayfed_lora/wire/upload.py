"""The uploads of a round's clients on their way to the server, and the server's download.

Source: this project; clipping: McMahan et al., arXiv:1710.06963, section 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from rayfed_lora.lora.stacked import A, B, StackedStates, named
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import AdapterState, Factors, FloatArray, Frozen
from rayfed_lora.wire.update import Stacked, UpdateMethod
from rayfed_lora.wire.updates import UPDATES


@dataclass(frozen=True)
class Named:
    """A method by its name in recipes, and its options; picklable, whatever its code."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)

    def method(self) -> UpdateMethod:
        """Return the method."""
        return UPDATES.with_options(self.name, self.options)


@dataclass(frozen=True)
class Upload:
    """What happens to the updates of a run's clients, in the order of the attributes.

    Attributes:
        seed: of the run.
        attack: of the malicious clients, on their updates; None: there are none.
        malicious: ids of such clients.
        clip: largest 2-norm of a client's whole update; None: no limit. An encoded update is
            clipped again by the server.
        codec: of the message.
        uniform: whether all clients count the same, instead of by their examples.
        error_feedback: whether a client adds to its update what the codec has lost before.
    """

    seed: int
    attack: Named | None = None
    malicious: frozenset[int] = frozenset()
    clip: float | None = None
    codec: Named = Named("float32")
    uniform: bool = False
    error_feedback: bool = False


@dataclass
class Lost:
    """What codecs have lost of clients' updates, by client and tensor (error feedback).

    Source: Seide et al. 2014, "1-bit SGD"; Karimireddy et al., arXiv:1901.09847.

    Attributes:
        before: up to this round; a client that has sent nothing yet, and a tensor of another shape
            (another rank), count as 0.
        after: of the clients that have sent in this round.
    """

    before: Mapping[int, Mapping[str, FloatArray]]
    after: dict[int, dict[str, FloatArray]] = field(default_factory=dict)

    def added(self, tensors: Stacked, clients: Sequence[int]) -> Stacked:
        """Return updates (clients, ...) plus what was lost of earlier ones."""
        found = {name: x.copy() for name, x in tensors.items()}
        for i, client in enumerate(clients):
            for name, lost in self.before.get(client, {}).items():
                if name in found and found[name].shape[1:] == lost.shape:
                    found[name][i] += lost
        return found

    def note(self, wanted: Stacked, seen: Stacked, clients: Sequence[int]) -> None:
        """Keep the difference between what was to be sent and what the server sees.

        Tensors that are not sent in this round keep what was lost before.
        """
        rest = {name: x - seen[name] for name, x in wanted.items()}
        for i, client in enumerate(clients):
            new = {name: x[i] for name, x in rest.items()}
            self.after[client] = {**self.before.get(client, {}), **new}


def rng_of(seed: int, purpose: str, round_index: int, client: int) -> np.random.Generator:
    """Return the generator of a method in one round, for a client or the server (0)."""
    digest = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return generator(seed, Purpose.UPDATE, digest, round_index, client)


def malicious_clients(seed: int, share: float, clients: int) -> npt.NDArray[np.int64]:
    """Return the malicious ones of a run's clients, floor(share * clients + 0.5), rising."""
    digest = int.from_bytes(hashlib.sha256(b"malicious").digest()[:4], "big")
    rng = generator(seed, Purpose.UPDATE, digest)
    count = min(clients, math.floor(share * clients + 0.5))
    return np.sort(rng.choice(clients, count, replace=False)).astype(np.int64)


def is_sent(name: str, frozen: Frozen | None, own_b: bool) -> bool:
    """Return whether a tensor, by `named`, is part of messages."""
    if name.startswith(A):
        return frozen != "a"
    return not (name.startswith(B) and (frozen == "b" or own_b))


def downloaded(
    state: AdapterState,
    codec: Named,
    seed: int,
    round_index: int,
    sends: Callable[[str], bool] = lambda name: True,
) -> AdapterState | None:
    """Return a state as clients see it after the download; None where they see it exactly.

    Args:
        state: of the server.
        codec: of the download.
        seed: of the run.
        round_index: from 0.
        sends: whether a tensor is sent; others are known to the clients.
    """
    method = codec.method()
    if method.lossless:
        return None
    tensors = named(state)
    given = {name: x[None] for name, x in tensors.items() if sends(name)}
    rng = rng_of(seed, f"down {codec.name}", round_index, 0)
    seen = method.seen(given, [rng], round_index, [-1])
    # Trainers take views, which strided arrays do not allow.
    return _with(state, {**tensors, **{n: np.ascontiguousarray(x[0]) for n, x in seen.items()}})


def uploaded(  # noqa: PLR0913 - the caller names them
    upload: Upload,
    round_index: int,
    clients: Sequence[int],
    states: Sequence[AdapterState],
    received: Sequence[AdapterState],
    exact: Sequence[AdapterState],
    sends: Callable[[str], bool],
    *,
    lost: Lost | None = None,
) -> Sequence[AdapterState]:
    """Return clients' states as the server sees them: its own state plus what it sees of updates.

    Clients that were trained together stay together.

    Args:
        upload: of the run.
        round_index: from 0.
        clients: ids.
        states: trained, of each client.
        received: that each started from.
        exact: the server's own, of which `received` is what the download left.
        sends: whether a tensor is sent; others stay as trained.
        lost: of earlier updates; gets that of these ones.
    """
    way = _Way(upload, round_index, sends, lost or Lost({}))
    if isinstance(states, StackedStates) and len(states) > 1 and states.alike:
        rows = way.rows(states.rows, states.shapes, clients, _matrix(received), _matrix(exact))
        return replace(states, rows=rows)
    return [
        _unstacked(state, way.rows(row, _shapes(state), [client], _matrix([start]), _matrix([own])))
        for client, state, row, start, own in zip(
            clients, states, map(_row, states), received, exact, strict=True
        )
    ]


class _Way:
    """Takes rows of clients' values through the steps of an upload."""

    def __init__(
        self, upload: Upload, round_index: int, sends: Callable[[str], bool], lost: Lost
    ) -> None:
        self._upload, self._round, self._sends, self._lost = upload, round_index, sends, lost
        self._codec = upload.codec.method()
        self._attack = None if upload.attack is None else upload.attack.method()

    def rows(
        self,
        trained: FloatArray,
        shapes: Mapping[str, tuple[int, ...]],
        clients: Sequence[int],
        received: FloatArray,
        exact: FloatArray,
    ) -> FloatArray:
        """Return (clients, values) of what the server sees; `received` may be one row for all."""
        delta = trained - received
        places = {name: place for name, place in _places(shapes) if self._sends(name)}
        tensors = {
            name: delta[:, place].reshape(len(trained), *shapes[name])
            for name, place in places.items()
        }
        seen = self._seen(tensors, clients)
        found = trained.copy()
        for name, place in places.items():
            found[:, place] = exact[:, place] + seen[name].reshape(len(trained), -1)
        return found

    def _seen(self, tensors: Stacked, clients: Sequence[int]) -> Stacked:
        upload, codec = self._upload, self._codec
        tensors = self._attacked(tensors, clients)
        if upload.clip is not None:
            tensors = clipped(tensors, upload.clip)
        if codec.lossless or not tensors:
            return tensors
        if upload.error_feedback:
            tensors = self._lost.added(tensors, clients)
        seen = codec.seen(tensors, self._rngs(f"up {codec.name}", clients), self._round, clients)
        if upload.error_feedback:
            self._lost.note(tensors, seen, clients)
        return seen if upload.clip is None else clipped(seen, upload.clip)

    def _attacked(self, tensors: Stacked, clients: Sequence[int]) -> Stacked:
        attack = self._attack
        where = [i for i, client in enumerate(clients) if client in self._upload.malicious]
        if attack is None or not where or not tensors:
            return tensors
        ids = [clients[i] for i in where]
        own = {name: x[where] for name, x in tensors.items()}
        sent = attack.seen(own, self._rngs(f"attack {attack.name}", ids), self._round, ids)
        found = {name: x.copy() for name, x in tensors.items()}
        for name, x in found.items():
            x[where] = sent[name]
        return found

    def _rngs(self, purpose: str, clients: Sequence[int]) -> list[np.random.Generator]:
        return [rng_of(self._upload.seed, purpose, self._round, client) for client in clients]


def clipped(tensors: Stacked, most: float) -> Stacked:
    """Return updates (clients, ...) scaled by min(1, most / 2-norm of a client's whole update).

    A client with a shorter update keeps its bits.
    """
    count = len(next(iter(tensors.values()), ()))
    squares = np.zeros(count)
    for x in tensors.values():
        flat = x.reshape(count, -1).astype(np.float64)
        squares += [float(row @ row) for row in flat]
    norms = np.sqrt(squares)
    # Rounded down, so that rounding does not exceed the limit by more than a value's own.
    factors = np.divide(most, norms, out=np.ones(count), where=norms > most)
    if (factors == 1.0).all():
        return tensors
    shaped = {name: factors.reshape(-1, *[1] * (x.ndim - 1)) for name, x in tensors.items()}
    return {name: (x * shaped[name]).astype(np.float32) for name, x in tensors.items()}


def _places(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, slice]]:
    edges = accumulate(map(math.prod, shapes.values()), initial=0)
    for name, (low, high) in zip(shapes, pairwise(edges), strict=True):
        yield name, slice(low, high)


def _shapes(state: AdapterState) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in named(state).items()}


def _row(state: AdapterState) -> FloatArray:
    flat = [x.ravel() for x in named(state).values()]
    return (np.concatenate(flat) if flat else np.zeros(0, np.float32))[None]


def _matrix(states: Sequence[AdapterState]) -> FloatArray:
    """Return a row for each state, or one row where all are the same."""
    if all(state.version == states[0].version for state in states):
        return _row(states[0])
    return np.concatenate([_row(state) for state in states])


def _unstacked(like: AdapterState, row: FloatArray) -> AdapterState:
    shapes = _shapes(like)
    return _with(like, {n: row[0, place].reshape(shapes[n]) for n, place in _places(shapes)})


def _with(like: AdapterState, tensors: Mapping[str, FloatArray]) -> AdapterState:
    """Return a new state with tensors by `named`."""
    factors = {
        name: Factors(tensors[A + name], tensors[B + name], f.scale)
        for name, f in like.factors.items()
    }
    return AdapterState(factors, {name: tensors[name] for name in like.dense})
