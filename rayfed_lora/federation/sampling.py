"""The cohort of a round and its blocks (docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from rayfed_lora.plugins.calls import own_method
from rayfed_lora.plugins.tables import SAMPLERS
from rayfed_lora.recipe.memory import checkpoints, largest_batch, room_bytes, step_bytes
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.tasks.messages import Block
from rayfed_lora.types import ClientReport, Device, ModelShape
from rayfed_lora.wire.upload import malicious_clients

IdArray = npt.NDArray[np.int64]

_TESTED_TOGETHER = 50
# Minimum number of blocks of a round that has so many clients.
_BLOCKS_TO_SHARE = 4
_FEW_BLOCKS = 8


@dataclass(frozen=True)
class _BlockLimits:
    """The size of a block up to which it trains faster than smaller ones, on a kind of device.

    Attributes:
        linear_flops: work of one call of a linear layer that outweighs the cost of a call.
        clients: largest number of clients.
    """

    linear_flops: float
    clients: int


# Measured: benchmarks/README.md. A GPU's are estimates from its launch time and speed.
_LIMITS: Mapping[Device, _BlockLimits] = {
    "cpu": _BlockLimits(linear_flops=8e7, clients=32),
    "cuda": _BlockLimits(linear_flops=1e10, clients=64),
}


@dataclass(frozen=True)
class BlockSize:
    """How a cohort is cut.

    Attributes:
        clients: maximum number of clients per block.
        even: the sizes of blocks differ by at most one; else only the last block is smaller.
        reason: for the user.
    """

    clients: int
    even: bool
    reason: str = ""


@dataclass(frozen=True)
class ClientHistory:
    """What the server knows of the clients, (clients,) arrays.

    Attributes:
        examples: number of training examples.
        losses: mean training loss of the last usable report; nan: none yet.
        rounds: round of that report; -1: none yet.
    """

    examples: IdArray
    losses: npt.NDArray[np.float64]
    rounds: IdArray

    @classmethod
    def empty(cls, examples: IdArray) -> ClientHistory:
        """Return the history before the first round."""
        return cls(examples, np.full(len(examples), np.nan), np.full(len(examples), -1, np.int64))

    def after(self, round_index: int, reports: Sequence[ClientReport]) -> ClientHistory:
        """Return the history after a round."""
        losses, rounds = self.losses.copy(), self.rounds.copy()
        for report in reports:
            if report.usable:
                losses[report.client], rounds[report.client] = report.train_loss, round_index
        return ClientHistory(self.examples, losses, rounds)


def sampler(name: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Register a sampler: a function of (pool, wanted, history, rng) that returns client ids.

    `pool` are (n,) the clients that can be reached, `wanted` <= n how many to return, `history` a
    `ClientHistory` of all clients, `rng` a numpy generator of the run's seed and the round.
    Keyword-only parameters are its options.

    Args:
        name: value of `clients.sampler`; default: the function's, with hyphens.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """
    return lambda function: SAMPLERS.add(function, name)


@sampler()
def uniform(
    pool: IdArray, wanted: int, history: ClientHistory, rng: np.random.Generator
) -> IdArray:
    """Draw uniformly without replacement."""
    del history
    return rng.choice(pool, wanted, replace=False, shuffle=False)


@sampler()
def power_of_choice(
    pool: IdArray,
    wanted: int,
    history: ClientHistory,
    rng: np.random.Generator,
    *,
    candidates: Annotated[int, Field(ge=1)] = 20,
) -> IdArray:
    """Return those of some candidates whose last losses are largest; clients without one first.

    The candidates, at least `wanted`, are drawn with probability proportional to the number of
    examples. No messages are spent on losses: the variant rpow-d, with the loss that a client
    reported when it last took part.

    Source: arXiv:2010.01243, section 4.
    """
    share = history.examples[pool] / history.examples[pool].sum()
    count = min(max(candidates, wanted), int(np.count_nonzero(share)))
    drawn: IdArray = rng.choice(pool, count, replace=False, p=share)
    losses = np.nan_to_num(history.losses[drawn], nan=np.inf, posinf=np.inf)
    best: IdArray = drawn[np.argsort(-losses, kind="stable")[:wanted]]
    return best


def cohort(
    recipe: Recipe,
    history: ClientHistory,
    round_index: int,
    reachable: IdArray | None = None,
) -> tuple[int, ...]:
    """Return the clients of a round, drawn by the recipe's sampler, in rising order.

    With Poisson sampling (`privacy.sampling`) each client is drawn by itself: there may be none.

    Args:
        recipe: gives the sampler, the size and the seed.
        history: of all clients.
        round_index: from 0.
        reachable: clients that can be drawn, all of them where there are too few; None: all.

    Raises:
        RunError: an own sampler raised, or did not return that many different clients.
    """
    rng = generator(recipe.seed, Purpose.COHORT, round_index)
    clients = len(history.examples)
    if recipe.privacy is not None and recipe.privacy.sampling == "poisson":
        there = rng.random(clients) < recipe.cohort_size(clients) / clients
        return tuple(np.flatnonzero(there).tolist())
    pool = np.arange(clients) if reachable is None else reachable
    wanted = min(recipe.drawn(clients), len(pool))
    settings = recipe.clients.sampler
    draw = SAMPLERS.with_options(settings.name, settings.options)
    with own_method("sampler", settings.name, round_index):
        drawn = np.asarray(draw(pool, wanted, history, rng))
        found = np.unique(drawn)
        if drawn.shape != (wanted,) or len(found) != wanted or not np.isin(found, pool).all():
            raise ValueError(
                f"expected {wanted} different clients of the {len(pool)} that can be reached, got"
                f" {drawn.tolist()}"
            )
    return tuple(int(client) for client in found)


def attackers(recipe: Recipe, clients: int) -> frozenset[int]:
    """Return the ids of the malicious ones of a run's clients."""
    attack = recipe.clients.attack
    share = 0.0 if attack is None else attack.share
    return frozenset(malicious_clients(recipe.seed, share, clients).tolist())


def tested_clients(recipe: Recipe, clients: int, round_index: int) -> list[Block]:
    """Return which of `clients` are tested on their own examples after a round, in blocks."""
    wanted = recipe.evaluation.clients
    chosen = np.arange(clients)
    if wanted != "all" and wanted < clients:
        rng = generator(recipe.seed, Purpose.TESTED_CLIENTS, round_index)
        chosen = np.sort(rng.choice(clients, wanted, replace=False))
    return blocks(tuple(chosen.tolist()), BlockSize(_TESTED_TOGETHER, even=False))


def rank_limits(recipe: Recipe, clients: int) -> npt.NDArray[np.int64] | None:
    """Return the largest rank that each client can train, (clients,); None where none is limited.

    `clients.ranks` lists ranks in turn, or maps each rank to its share of clients, drawn at random.
    """
    wanted = recipe.clients.ranks
    if wanted is None:
        return None
    if isinstance(wanted, Mapping):
        # In order of the ranks: how a recipe lists them changes nothing.
        ranks, shares = (np.array(part) for part in zip(*sorted(wanted.items()), strict=True))
        rng = generator(recipe.seed, Purpose.RANKS)
        return rng.choice(ranks, clients, p=shares / shares.sum()).astype(np.int64)
    return np.resize(np.atleast_1d(np.array(wanted, np.int64)), clients)


def blocks(cohort: tuple[int, ...], size: BlockSize) -> list[Block]:
    """Cut a cohort into blocks of consecutive clients.

    >>> blocks((1, 4, 5, 9), BlockSize(3, even=False))
    [(1, 4, 5), (9,)]
    >>> blocks((1, 4, 5, 9), BlockSize(3, even=True))
    [(1, 4), (5, 9)]
    """
    if not cohort:
        return []
    count = math.ceil(len(cohort) / size.clients)
    if not size.even:
        return [cohort[i * size.clients : (i + 1) * size.clients] for i in range(count)]
    edges = [i * len(cohort) // count for i in range(count + 1)]
    return [cohort[low:high] for low, high in pairwise(edges)]


def block_size(
    recipe: Recipe, shape: ModelShape, clients: int, device: Device, batch: int | None = None
) -> BlockSize:
    """Return how many clients of a cohort of `clients` are trained together, and why.

    `runtime.cohort_size` or, with `auto`, as many as give each linear layer enough work in one step
    to outweigh the cost of a call, as far as their activations fit, and no more than leave a few
    blocks for several actors to share. A full-model round trains one client at a time. `batch` is
    the largest batch size of a client; None: that of all.
    """
    wanted = recipe.runtime.cohort_size
    if shape.obstacle is not None:
        return BlockSize(1, True, f"one client at a time: {shape.obstacle}")
    if not isinstance(wanted, str):
        return BlockSize(wanted, False, f"{wanted} clients a block (runtime.cohort_size)")
    if shape.linear_flops == 0:
        return BlockSize(1, True, "one client at a time: the model's work could not be traced")
    limits, batch = _LIMITS[device], largest_batch(recipe, batch)
    work = shape.linear_flops * batch
    by_work = math.ceil(limits.linear_flops / work)
    held, room = step_bytes(recipe, shape, device, batch), room_bytes(shape, device)
    by_memory = max(1, math.floor(room / held))
    most = min(by_work, by_memory, limits.clients)
    fitting, shared = math.ceil(clients / most), min(clients, _BLOCKS_TO_SHARE)
    count = max(fitting, shared)
    if count < clients and count <= _FEW_BLOCKS:
        # A power of two: the usual numbers of actors then have equally many blocks each.
        count = min(clients, 2 ** math.ceil(math.log2(count)))
    size = math.ceil(clients / count)
    reason = (
        f"{size} client{'s' * (size > 1)} a block on a {'CPU' if device == 'cpu' else 'GPU'}; one"
        f" client's step gives a linear layer {work / 1e6:.3g} MFLOP (a call is worth"
        f" {limits.linear_flops / 1e6:.3g}) and holds about {held / 1e6:.3g} MB (a block may hold"
        f" {room / 1e6:.4g})"
    )
    if checkpoints(recipe, shape, 1, device, batch):
        reason += "; activations are computed again (runtime.checkpoint_activations)"
    if fitting < shared:
        reason += (
            f"; {shared} blocks a round for actors to share: with fewer of them, larger blocks"
            " (runtime.cohort_size) can be quicker"
        )
    return BlockSize(size, True, reason)
