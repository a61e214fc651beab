"""Method presets and other keys that are filled in where a recipe does not write them.

A preset sets only the keys that distinguish its method. An aggregation rule that names a method
(`Rule.method`) brings its preset.

Source: docs/method.md's tables; FedAvg arXiv:1602.05629, FedProx arXiv:1812.06127, SA-FedLoRA
arXiv:2405.09394 v1 and v2 (SPD-CFL; target mode is a surrogate for its SGC measure, which is not
public); BitFit arXiv:2106.10199; the papers of the rules: `rayfed_lora.aggregation`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.endpoints import guarded_in
from rayfed_lora.plugins.tables import MODELS
from rayfed_lora.recipe.plain_values import excess, merged, plain, value_at


def _method(
    mode: str, annealing: Mapping[str, Any] | None = None, **others: Any
) -> Mapping[str, Any]:
    """Return a preset with the keys that all set, so that any preset can replace any other."""
    initiating = {"trainable": "full", "proximal_weight": 0.0}
    usual = {"mode": mode, "initiating": initiating, "acceptance": "always"}
    return {"annealing": merged(usual, annealing or {}), **others}


# No rate: the default of the optimiser that the recipe asks for.
_AVERAGED = {"server_optimizer": {"name": "sgd", "lr": None}}
_PROXIMAL = {"initiating": {"proximal_weight": 0.01}}
# Its first stage trains an adapter too, so at the adapter's learning rate.
_ADAPTER_FIRST = {"initiating": {"trainable": "adapter", "proximal_weight": 0.01, "lr": None}}
_ONE_RANK = {"allocation": "uniform"}
_NO_FACTORS = {**_ONE_RANK, "heating": {"rank": 0}}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sa-fedlora": _method("staged", _PROXIMAL),
    "fedavg": _method("full", aggregation=_AVERAGED),
    "fedprox": _method("full", _PROXIMAL, aggregation=_AVERAGED),
    **{
        rule.method: _method("fixed", _ONE_RANK, aggregation={"rule": rule.name})
        for rule in RULES.values()
        if rule.method is not None
    },
    "scaffold": _method("full", aggregation=_AVERAGED, clients={"objective": {"name": "scaffold"}}),
    "feddyn": _method("full", aggregation=_AVERAGED, clients={"objective": {"name": "feddyn"}}),
    "spd-cfl": _method("staged", {**_ADAPTER_FIRST, "acceptance": "target"}),
    "head-only": _method("fixed", _NO_FACTORS, adapter={"train_head": True, "train_biases": False}),
    "bitfit": _method("fixed", _NO_FACTORS, adapter={"train_head": True, "train_biases": True}),
}


def preset(method: object, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys that a method fills in; none for an unknown one.

    Where ranks fall and clients train with adamw, `adapter.scaling` is `alpha_over_rank`: the size
    of adamw's steps does not depend on the gradient, so a step moves D by about lr * scale * rank,
    and under a constant scale a cut from rank 16 to 4 divides the learning rate by four too
    (source: this project; measured in benchmarks/README.md).

    `recipe` holds the values that the user has written.
    """
    scaling = usual_scaling(method, value_at(recipe, "clients", "optimizer", "name"))
    keys = _preset_of(method)
    return keys if scaling == "constant" else merged(keys, {"adapter": {"scaling": scaling}})


def _preset_of(method: object) -> Mapping[str, Any]:
    return PRESETS.get(method, {}) if isinstance(method, str) else {}


def usual_scaling(method: object, optimizer: object) -> str:
    """Return the default of `adapter.scaling`: see `preset`."""
    falls = value_at(_preset_of(method), "annealing", "mode") == "staged"
    return "alpha_over_rank" if falls and optimizer == "adamw" else "constant"


def usual_server_rate(optimizer: object) -> float:
    """Return the default of `aggregation.server_optimizer.lr`.

    Adam and yogi move each weight by about their rate at first; with sgd, 1 is plain averaging.
    """
    return 0.01 if optimizer in ("adam", "yogi") else 1.0


def filled(given: Mapping[str, Any], endpoints: Collection[str] = ()) -> dict[str, Any]:
    """Return a recipe's values with the keys that its method's preset and its task fill in.

    Idempotent: a key that is there wins. `endpoints` are those of object stores that the user has
    named elsewhere; see the module `endpoints`.

    Raises:
        ValueError: the values exceed the limits of `plain_values`.
    """
    found = excess(given)
    if found is not None:
        raise ValueError(found)
    written: dict[str, Any] = plain(given)
    content = merged(preset(method_of(written), written), written)
    return guarded_in(merged(task_defaults(content), content), endpoints)


def method_of(raw: Mapping[str, Any]) -> Any:
    """Return the method that a recipe is written for."""
    return raw.get("method", "sa-fedlora")


def task_defaults(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults that differ for a recipe's task: a language model has no head."""
    task, source = value_at(raw, "model", "task"), value_at(raw, "model", "source")
    if task is None and isinstance(source, str) and source in MODELS:
        task = MODELS[source].task
    language = task == "causal-lm"
    return {"adapter": {"train_head": False}} if language else {}
