"""Data and base models that are prepared once for several runs. Source: this project."""

from __future__ import annotations

import json
from collections import OrderedDict

import ray
from ray.exceptions import RayError

from rayfed_lora.engines.factory import Factory, prepared
from rayfed_lora.recipe.recipe import Recipe

PREPARING = "prepare data and base"
# Runs hold what they use; what nobody has asked for lately is prepared again when it is.
_KEPT = 4


class Shelf:
    """Keeps the newest workloads and weights in the object store; runs as an actor.

    Not decorated, so that tests build it without an actor.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._kept: OrderedDict[str, list[ray.ObjectRef]] = OrderedDict()

    def __repr__(self) -> str:
        return "shelf of data and bases"

    def prepared(self, recipe: Recipe, factory: Factory) -> list[ray.ObjectRef]:
        """Return at once three references: what tells of success, workload and weights."""
        made_from = prepared_from(recipe)
        kept = self._kept.pop(made_from, None)
        if kept is None or _failed(kept[0]):
            # No CPU of its own: trials may have reserved all there are.
            task = ray.remote(prepared).options(name=PREPARING, num_cpus=0, num_returns=3)
            kept = task.remote(recipe, factory)
        self._kept[made_from] = kept
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return kept


def _failed(done: ray.ObjectRef) -> bool:
    ready, _ = ray.wait([done], timeout=0)
    try:
        ray.get(ready)
    except RayError:
        return True
    return False


def prepared_from(recipe: Recipe) -> str:
    """Return what workload and weights depend on."""
    parts = {
        "seed": recipe.seed,
        "data": recipe.data.model_dump(),
        "model": recipe.model.model_dump(),
        # Decides the type of the weights.
        "gpu": recipe.runtime.device == "cuda",
        "validation": recipe.validation_fraction,
        # Of malicious clients, the labels may be other ones.
        "attack": recipe.clients.attack and recipe.clients.attack.model_dump(),
        "cohort": recipe.clients.per_round,
        "held out": recipe.evaluation.client_fraction,
        "device columns": recipe.device_columns,
        # Their values are checked by what they are for.
        "own settings": {key: own.column for key, own in recipe.own_settings.items()},
        "trace": recipe.clients.availability.model_dump(exclude={"dropout"}),
    }
    return json.dumps(parts, sort_keys=True)
