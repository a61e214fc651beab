"""Numbers as texts with their units. Source: this project."""

from __future__ import annotations


def megabytes(count: float) -> str:
    """Return a number of bytes in a readable unit (powers of 1000).

    >>> megabytes(1_234_567), megabytes(12), megabytes(2.5e9)
    ('1.23 MB', '12 B', '2.50 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def percent(share: float | None) -> str:
    """Return a share in percent, `-` for None.

    >>> percent(0.9362), percent(None)
    ('93.62 %', '-')
    """
    return "-" if share is None else f"{100 * share:.2f} %"


def duration(seconds: float | None) -> str:
    """Return seconds as m:ss or h:mm:ss, `-:--` for None.

    >>> duration(75), duration(3675), duration(None)
    ('1:15', '1:01:15', '-:--')
    """
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
