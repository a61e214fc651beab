"""Ray Tune's output and signal handlers in this process. Source: this project."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's newer output cannot be silenced
}


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Silence Ray Tune's output and leave SIGINT to our own handler."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    logger = logging.getLogger("ray.tune")
    level, handler = logger.level, signal.getsignal(signal.SIGUSR1)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            # Tune does not restore the handler.
            signal.signal(signal.SIGUSR1, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def stop_tune() -> None:
    """Make Tune save its state and end; raise KeyboardInterrupt where it has not started."""
    if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, None):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGUSR1)
