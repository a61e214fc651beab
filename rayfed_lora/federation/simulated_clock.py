"""The simulated clock: which clients of a cohort arrive in time, and how long a round takes.

Nothing here waits: both follow from the sizes of messages, the clients' devices and a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayfed_lora.data.client_numbers import ClientSettings, numbers_of
from rayfed_lora.errors import RunError
from rayfed_lora.federation import sampling
from rayfed_lora.federation.bills import Bill
from rayfed_lora.federation.sampling import ClientHistory
from rayfed_lora.federation.traffic import Sent
from rayfed_lora.recipe.clients import Spread
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.types import TRACE_DIGITS, Absence, AvailabilityTrace, DeviceFacts

Times = npt.NDArray[np.float64]
Clients = npt.NDArray[np.int64]
# Work of an example: forward, gradients of the layers' outputs, gradients of the weights; with a
# frozen base the last third is left out, except for the adapter's.
_FULL_MODEL_WORK = 1.5
_BYTES_PER_MEGABIT = 125_000


@dataclass(frozen=True)
class Turnout:
    """Which clients of a cohort arrived, left (`dropped`) or came too late (`late`).

    Attributes:
        absences: by client that did not arrive.
        seconds: (cohort,) from the start of the round until the update arrived, or the server
            stopped waiting for it.
        sent: the shares of the messages that were sent.
        length_s: length of the round.
    """

    absences: dict[int, Absence]
    seconds: Times
    sent: Sent
    length_s: float


class SimulatedClock:
    """Times a run from the clients' devices and the network between them and the server."""

    def __init__(self, recipe: Recipe, facts: DeviceFacts) -> None:
        """Draw each client's speed and bandwidths."""
        self._recipe = recipe
        self._facts = facts
        network = recipe.network
        self._settings = ClientSettings.of(recipe, facts)
        self._speed = self._drawn(recipe.clients.speed, 0)
        self._up = self._drawn(network.up_mbps, 1) * _BYTES_PER_MEGABIT
        self._down = self._drawn(network.down_mbps, 2) * _BYTES_PER_MEGABIT

    def _drawn(self, spread: Spread | None, stream: int) -> Times:
        """Return each client's number, (clients,); infinite where there is none."""
        if spread is None:
            return np.full(len(self._facts.sizes), np.inf)
        return numbers_of(spread, self._facts, self._recipe.seed, stream)

    def cohort(
        self, t: int, now: float, history: ClientHistory | None = None
    ) -> tuple[tuple[int, ...], float]:
        """Return the cohort of round `t`, and when it is drawn: once any client can be reached.

        `now` and the result are simulated seconds since the start of the run; the sampler sees
        `history`, None: that of a run that has not begun.

        Raises:
            RunError: no client can ever be reached again.
        """
        history = history or ClientHistory.empty(self._facts.sizes)
        if self._facts.trace is None:
            return sampling.cohort(self._recipe, history, t), now
        reachable, now = self._reachable(self._facts.trace, now)
        return sampling.cohort(self._recipe, history, t, reachable), now

    def _reachable(self, trace: AvailabilityTrace, now: float) -> tuple[Clients, float]:
        lap, clock = self._lap(now)
        period = self._recipe.clients.availability.period_s
        there = _at(trace, clock)
        if not there.any():
            coming = trace.start_s[trace.start_s > clock]
            if len(coming) == 0:
                if period is None:
                    raise RunError(
                        f"no client can be reached after {now:g} s of the simulated clock: the"
                        " trace of clients.availability has ended; expected a longer one, or"
                        " period_s"
                    )
                lap, coming = lap + period, trace.start_s
            clock = float(coming.min())
            there, now = _at(trace, clock), lap + clock
        return np.unique(trace.client[there]), now

    def _lap(self, now: float) -> tuple[float, float]:
        """Return when the trace was last begun anew, and the seconds since."""
        period = self._recipe.clients.availability.period_s
        if period is None:
            return 0.0, round(now, TRACE_DIGITS)
        lap = now // period * period
        clock = max(round(now - lap, TRACE_DIGITS), 0.0)
        # At the very end of a lap the division may say either.
        return (lap + period, 0.0) if clock >= round(period, TRACE_DIGITS) else (lap, clock)

    def turnout(
        self, t: int, cohort: tuple[int, ...], bill: Bill, full: bool, now: float
    ) -> Turnout:
        """Return the turnout of a cohort in round `t`.

        A client receives its download, trains, and sends its upload; one that leaves does so at a
        uniformly drawn point of that, or when its trace says so. The server waits until all have
        arrived or left, at most `deadline_s`, and with `over_select` for the first `per_round`.

        Args:
            t: index of the round.
            cohort: client ids.
            bill: sizes of the messages if all arrive.
            full: whether every weight is trained.
            now: simulated seconds since the start of the run.
        """
        k = np.asarray(cohort, np.int64)
        latency = self._recipe.network.latency_s
        down = (bill.sent_down + bill.sent_base) / self._down[k]
        train = self._examples(k) * (_FULL_MODEL_WORK if full else 1.0) / self._speed[k]
        up = bill.sent_up / self._up[k]
        sending = down + latency + train
        whole = sending + up + latency
        rng = generator(self._recipe.seed, Purpose.DEPARTURES, t)
        leaves = np.minimum(self._departures(rng, whole), self._trace_ends(k, now))
        arrives = np.where(whole < leaves, whole, np.inf)
        # Clients that arrive at the same moment are taken in random order, not by number.
        order = np.lexsort((rng.permutation(len(k)), arrives))
        wanted = self._recipe.cohort_size(len(self._facts.sizes))
        length = self._length(arrives[order], np.minimum(whole, leaves), wanted)
        first = np.zeros(len(k), bool)
        first[order[:wanted]] = True
        there = first & (arrives <= length)
        stopped = np.minimum(leaves, length)
        absences: dict[int, Absence] = {
            client: "dropped" if left else "late"
            for client, left in zip(k[~there].tolist(), (leaves <= length)[~there], strict=True)
        }
        sent = Sent(
            absent=~there,
            down=np.where(there, 1.0, _share(stopped, down, begun=1.0)),
            up=np.where(there, 1.0, _share(stopped - sending, up, begun=0.0)),
        )
        return Turnout(absences, np.where(there, whole, stopped), sent, length)

    def _examples(self, k: Clients) -> Clients:
        """Return how many examples each client trains on, repeats included."""
        epochs = self._recipe.clients.local_epochs or 1
        return self._settings.examples_trained_on(k, self._facts.sizes[k], epochs)

    def _departures(self, rng: np.random.Generator, whole: Times) -> Times:
        """Return when each client leaves of its own accord; infinite where it does not."""
        leaving = rng.random(len(whole)) < self._recipe.clients.availability.dropout
        return np.where(leaving, rng.random(len(whole)) * whole, np.inf)

    def _trace_ends(self, k: Clients, now: float) -> Times:
        """Return in how many seconds the trace takes each client away."""
        trace = self._facts.trace
        if trace is None:
            return np.full(len(k), np.inf)
        _, clock = self._lap(now)
        there = _at(trace, clock)
        ends = np.full(len(self._facts.sizes), clock)
        np.maximum.at(ends, trace.client[there], trace.end_s[there])
        period = self._recipe.clients.availability.period_s
        if period is not None:
            # A client that is there until the end of a lap may be there at the next one's start.
            first = np.zeros(len(ends))
            early = trace.start_s == 0.0
            np.maximum.at(first, trace.client[early], trace.end_s[early])
            end = round(period, TRACE_DIGITS)
            ends = np.where(ends < end, ends, np.where(first < end, end + first, np.inf))
        return ends[k] - clock

    def _length(self, arrives: Times, known: Times, wanted: int) -> float:
        """Return how long the server waits for `wanted` clients.

        `arrives` rises and is infinite for clients that never arrive; `known` is when each has
        arrived or left; both (cohort,).
        """
        enough = arrives[wanted - 1] if len(arrives) >= wanted else np.inf
        deadline = self._recipe.clients.deadline_s
        return float(min(enough, known.max(), np.inf if deadline is None else deadline))


def _at(trace: AvailabilityTrace, clock: float) -> npt.NDArray[np.bool_]:
    """Return which rows of a trace hold at a moment."""
    there: npt.NDArray[np.bool_] = (trace.start_s <= clock) & (clock < trace.end_s)
    return there


def _share(elapsed: Times, needed: Times, begun: float) -> Times:
    """Return the share of a message that was sent; one that takes no time: `begun` or nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(elapsed / needed, 0.0, 1.0)
    return np.where(needed > 0, share, np.where(elapsed >= 0, begun, 0.0))
