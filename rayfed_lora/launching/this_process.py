"""Runs in this process: engine, absolute folder, stopping signals. Source: this project."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rayfed_lora.engines.factory import Factory, in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.errors import BadInputError, ResourceError
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.storage import RunFolder


def local_engine(recipe: Recipe, factory: Factory, device: str | None = None) -> LocalEngine:
    """Return the engine of a run in this process; the torch device defaults to `runtime.device`.

    Raises:
        ResourceError: the recipe asks for a GPU that torch does not find.
    """
    if device is None and recipe.runtime.device == "cuda":
        from rayfed_lora.training.device import seen_gpus

        if seen_gpus() == 0:
            raise ResourceError("runtime.device 'cuda': torch finds no GPU on this machine")
        device = "cuda:0"
    return LocalEngine(lambda: in_process(recipe, factory, device or "cpu"))


def refuse_address(recipe: Recipe, address: str | None) -> None:
    """Raise BadInputError if `address` names a cluster for a run in this process."""
    if address is not None and recipe.runtime.executor == "local":
        raise BadInputError(
            f"--address: expected none with runtime.executor local, which runs in this process; got"
            f" {address!r}; runtime.executor ray runs on a cluster"
        )


def absolute(folder: RunFolder) -> str:
    """Return the location of a run folder as another process of this machine finds it."""
    return folder.location if folder.local is None else str(folder.local)


@contextmanager
def interruptible(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; raise KeyboardInterrupt at the second.

    Outside the main thread, which alone receives signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        stop()

    # Ray stops a job by SIGTERM.
    stopping = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in stopping}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
