"""The communication ledger: what a real network would carry, not what Ray moves.

Source: this project (method.md, "The communication ledger").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from rayfed_lora.annealing.budget import cost
from rayfed_lora.types import ModelShape, Trainable

BYTES_A_VALUE = 4
_NEVER = -1


@dataclass(frozen=True)
class Bill:
    """What one round sent.

    Attributes:
        up_params: values in one client's upload.
        down_params: values in one client's download, base not included.
        sent, arrived: number of downloads and of uploads.
        base_params: values of frozen base sent, over all clients.
    """

    up_params: int
    down_params: int
    sent: int
    arrived: int
    base_params: int

    @property
    def params_up(self) -> int:
        """Values sent by the cohort."""
        return self.up_params * self.arrived

    @property
    def params_down(self) -> int:
        """Values sent to the cohort, base not included."""
        return self.down_params * self.sent


@dataclass(frozen=True)
class Totals:
    """Bytes of a run so far; the `later_` ones are of the rounds after the initiating stage."""

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_base: int = 0
    fedavg: int = 0
    later: int = 0
    later_base: int = 0
    later_fedavg: int = 0

    def communication(self) -> dict[str, float | int | None]:
        """Return the summary's `communication`; a reduction without rounds behind it is None.

        reduction = 1 - (up + down) / FedAvg's, with the same clients, rounds and participation.
        """
        total = self.bytes_up + self.bytes_down
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_base": self.bytes_base,
            "total_bytes": total,
            "fedavg_total_bytes": self.fedavg,
            "reduction_vs_fedavg": _reduction(total, self.fedavg),
            "reduction_vs_fedavg_with_base": _reduction(total + self.bytes_base, self.fedavg),
            "reduction_vs_fedavg_after_initiating": _reduction(self.later, self.later_fedavg),
            "reduction_vs_fedavg_with_base_after_initiating": _reduction(
                self.later + self.later_base, self.later_fedavg
            ),
        }


def _reduction(sent: int, fedavg: int) -> float | None:
    return None if fedavg == 0 else 1.0 - sent / fedavg


class Ledger:
    """Books every message of a run and remembers which base each client holds.

    A base version is replaced as a whole, or extended by a fold that a client can catch up on by
    the folded factors alone.
    """

    def __init__(self, shape: ModelShape, clients: int) -> None:
        """Start with no client holding any base.

        Args:
            shape: the model's sizes.
            clients: number of clients there are.
        """
        self._shape = shape
        self._held = np.full(clients, _NEVER, dtype=np.int64)
        # Cost of the step from version i to i + 1, in values; a replacement costs the whole base.
        self._steps: list[int] = []
        self.totals = Totals()

    def replace_base(self) -> None:
        """Note that the frozen base is another one from now on."""
        self._steps.append(self._shape.base_params)

    def fold_base(self, params: int) -> None:
        """Note that a residual of `params` values was folded into the base."""
        self._steps.append(params)

    def book(
        self,
        trainable: Trainable,
        ranks: Mapping[str, int],
        cohort: Sequence[int],
        arrived: int,
        *,
        down_ranks: Mapping[str, int] | None = None,
        after_initiating: bool = True,
    ) -> Bill:
        """Book a round and return its bill.

        A full-model round sends the whole model both ways and with it the base; an adapter round
        sends factors and head, and the base or its catch-up to whom does not hold it. Nothing is
        booked as sent by a client that failed.

        Args:
            trainable: `full` or `adapter`.
            ranks: rank by module that clients train and send.
            cohort: clients of the round.
            arrived: number of them whose update arrived.
            down_ranks: rank by module of the download, where it differs: in a round whose shrink
                is folded, clients get the factors before the cut, to fold the rest themselves.
            after_initiating: whether the round is after the initiating stage.
        """
        members = np.asarray(cohort, dtype=np.int64)
        if trainable == "full":
            up = down = self._shape.total_params
            base = 0
        else:
            up = cost(self._shape.modules, ranks) + self._shape.head_params
            down = cost(self._shape.modules, down_ranks or ranks) + self._shape.head_params
            own_cut = 0 if down_ranks is None else 1
            base = int(self._catch_up(members, len(self._steps) - own_cut).sum())
        self._held[members] = len(self._steps)
        bill = Bill(up, down, len(members), arrived, base)
        self._add(bill, after_initiating)
        return bill

    def _catch_up(self, members: npt.NDArray[np.int64], version: int) -> npt.NDArray[np.int64]:
        """Return the values each member must be sent to hold a base version."""
        whole = self._shape.base_params
        behind = np.concatenate([[0], np.cumsum(self._steps, dtype=np.int64)])
        held = self._held[members]
        missed = np.maximum(behind[version] - behind[np.maximum(held, 0)], 0)
        return np.where(held == _NEVER, whole, np.minimum(missed, whole))

    def _add(self, bill: Bill, after_initiating: bool) -> None:
        t = self.totals
        up, down = bill.params_up * BYTES_A_VALUE, bill.params_down * BYTES_A_VALUE
        base = bill.base_params * BYTES_A_VALUE
        fedavg = (bill.sent + bill.arrived) * self._shape.total_params * BYTES_A_VALUE
        self.totals = replace(
            t,
            bytes_up=t.bytes_up + up,
            bytes_down=t.bytes_down + down,
            bytes_base=t.bytes_base + base,
            fedavg=t.fedavg + fedavg,
            later=t.later + (up + down) * after_initiating,
            later_base=t.later_base + base * after_initiating,
            later_fedavg=t.later_fedavg + fedavg * after_initiating,
        )

    def snapshot(self) -> tuple[dict[str, object], npt.NDArray[np.int64]]:
        """Return what a checkpoint keeps: JSON values, and (clients,) held versions."""
        return {"steps": list(self._steps), "totals": asdict(self.totals)}, self._held.copy()

    def restore(
        self, steps: Sequence[int], totals: Mapping[str, int], held: npt.NDArray[np.int64]
    ) -> None:
        """Go back to a snapshot."""
        self._steps, self.totals, self._held = list(steps), Totals(**totals), held.copy()
