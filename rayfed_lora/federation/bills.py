"""What rounds sent, in values and bytes. Source: docs/method.md, "The communication ledger"."""

from __future__ import annotations

from dataclasses import dataclass

from rayfed_lora.aggregation.messages import Counts
from rayfed_lora.wire.update import BYTES_PER_VALUE


@dataclass(frozen=True)
class Bill:
    """What one round sent, in values.

    Attributes:
        up: (cohort,) each client's upload, 0 where none arrived.
        down: (cohort,) each client's download, base not included.
        base: (cohort,) the frozen base, and frozen factors, that each client was sent.
        base_bytes: (cohort,) the same in bytes, as the base is stored; None: 4 a value.
        arrived: number of uploads.
        fedavg: values that FedAvg would have sent both ways with the same clients and shares.
        up_bytes, down_bytes: (cohort,) the messages in bytes, as encoded; None: 4 a value.
        fedavg_bytes: what FedAvg would have sent under the same codecs; None: 4 a value.
    """

    up: Counts
    down: Counts
    base: Counts
    arrived: int
    fedavg: int = 0
    up_bytes: Counts | None = None
    down_bytes: Counts | None = None
    fedavg_bytes: int | None = None
    base_bytes: Counts | None = None

    @property
    def sent_up(self) -> Counts:
        """(cohort,) bytes of each client's upload."""
        return self.up * BYTES_PER_VALUE if self.up_bytes is None else self.up_bytes

    @property
    def sent_down(self) -> Counts:
        """(cohort,) bytes of each client's download, base not included."""
        return self.down * BYTES_PER_VALUE if self.down_bytes is None else self.down_bytes

    @property
    def sent_base(self) -> Counts:
        """(cohort,) bytes of frozen base and frozen factors that each client was sent."""
        return self.base * BYTES_PER_VALUE if self.base_bytes is None else self.base_bytes

    @property
    def params_up(self) -> int:
        """Values sent by the cohort."""
        return int(self.up.sum())

    @property
    def params_down(self) -> int:
        """Values sent to the cohort, base not included."""
        return int(self.down.sum())

    @property
    def base_params(self) -> int:
        """Values of frozen base sent to the cohort."""
        return int(self.base.sum())


@dataclass(frozen=True)
class Totals:
    """Bytes of a run so far; `later`, `later_*`: of the rounds after the initiating stage.

    `encoded`: FedAvg's under the same codecs; None: as `fedavg`, which is in float32.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_base: int = 0
    fedavg: int = 0
    later: int = 0
    later_base: int = 0
    later_fedavg: int = 0
    encoded: int | None = None

    def communication(self) -> dict[str, float | int | None]:
        """Return the summary's `communication`; a reduction without rounds behind it is None.

        reduction = 1 - (up + down) / FedAvg's, with the same clients, rounds and participation.
        """
        total = self.bytes_up + self.bytes_down
        encoded = self.fedavg if self.encoded is None else self.encoded
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_base": self.bytes_base,
            "total_bytes": total,
            "fedavg_total_bytes": self.fedavg,
            "fedavg_total_bytes_same_codec": encoded,
            "reduction_vs_fedavg": _reduction(total, self.fedavg),
            "reduction_vs_fedavg_same_codec": _reduction(total, encoded),
            "reduction_vs_fedavg_with_base": _reduction(total + self.bytes_base, self.fedavg),
            "reduction_vs_fedavg_after_initiating": _reduction(self.later, self.later_fedavg),
            "reduction_vs_fedavg_with_base_after_initiating": _reduction(
                self.later + self.later_base, self.later_fedavg
            ),
        }

    def plus(self, bill: Bill, after_initiating: bool) -> Totals:
        """Return the totals after one more round."""
        up, down = int(bill.sent_up.sum()), int(bill.sent_down.sum())
        base, fedavg = int(bill.sent_base.sum()), bill.fedavg * BYTES_PER_VALUE
        encoded = self.encoded
        if bill.fedavg_bytes is not None:
            encoded = (self.fedavg if encoded is None else encoded) + bill.fedavg_bytes
        return Totals(
            bytes_up=self.bytes_up + up,
            bytes_down=self.bytes_down + down,
            bytes_base=self.bytes_base + base,
            fedavg=self.fedavg + fedavg,
            later=self.later + (up + down) * after_initiating,
            later_base=self.later_base + base * after_initiating,
            later_fedavg=self.later_fedavg + fedavg * after_initiating,
            encoded=encoded,
        )


def _reduction(sent: int, fedavg: int) -> float | None:
    return None if fedavg == 0 else 1.0 - sent / fedavg
