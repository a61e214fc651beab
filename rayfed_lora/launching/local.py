"""A run in this process, without Ray. Source: this project."""

from __future__ import annotations

from rayfed_lora.engines.factory import Factory, in_process
from rayfed_lora.engines.local import LocalEngine
from rayfed_lora.errors import BadInputError, ResourceError
from rayfed_lora.recipe.recipe import Recipe


def local_engine(recipe: Recipe, factory: Factory, device: str | None = None) -> LocalEngine:
    """Return the engine of a run in this process.

    Args:
        recipe: the run.
        factory: builds workload and trainers.
        device: of torch; default as `runtime.device` asks.

    Raises:
        ResourceError: the recipe asks for a GPU that torch does not find.
    """
    where = _device(recipe) if device is None else device
    return LocalEngine(lambda: in_process(recipe, factory, where))


def _device(recipe: Recipe) -> str:
    if recipe.runtime.device != "cuda":
        return "cpu"
    from rayfed_lora.training.device import seen_gpus

    if seen_gpus() == 0:
        raise ResourceError("runtime.device 'cuda': torch finds no GPU on this machine")
    return "cuda:0"


def refuse_address(recipe: Recipe, address: str | None) -> None:
    """Check that no cluster is named for a run in this process.

    Raises:
        BadInputError: `address` names one.
    """
    if address is not None and recipe.runtime.executor == "local":
        raise BadInputError(
            f"--address: expected none with runtime.executor local, which runs in this process; got"
            f" {address!r}; runtime.executor ray runs on a cluster"
        )
