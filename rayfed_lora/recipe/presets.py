"""Method presets: the keys that a method's name fills in.

Only what sets a method apart stands here; everything else is the recipe's default. Source:
docs/method.md's tables; FedAvg arXiv:1602.05629, FedProx arXiv:1812.06127, SA-FedLoRA
arXiv:2405.09394 v1 and v2 (SPD-CFL; target mode is a surrogate for its SGC measure, which is not
public); BitFit arXiv:2106.10199; the papers of the rules: `aggregation.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def _method(
    mode: str,
    *,
    trainable: str = "full",
    proximal_weight: float = 0.0,
    acceptance: str = "always",
    **others: Any,
) -> dict[str, Any]:
    """Return the keys that every preset sets, so that any of them can replace any other."""
    return {
        "annealing": {
            "mode": mode,
            "initiating": {"trainable": trainable, "proximal_weight": proximal_weight},
            "acceptance": acceptance,
        },
        **others,
    }


def _fixed(rule: str) -> dict[str, Any]:
    """Return a method that trains an adapter of one rank in all rounds under a rule."""
    method = _method("fixed", aggregation={"rule": rule})
    method["annealing"] |= {"allocation": "uniform"}
    return method


def _initiated_by_adapter(mode: str, **others: Any) -> dict[str, Any]:
    """Return a method whose first stage trains the adapter, at the adapter's learning rate."""
    method = _method(mode, trainable="adapter", **others)
    method["annealing"]["initiating"] |= {"lr": None}
    return method


def _without_factors(*, train_biases: bool) -> dict[str, Any]:
    """Return a method that trains some of the model's own tensors only."""
    method = _method("fixed", adapter={"train_head": True, "train_biases": train_biases})
    method["annealing"] |= {"allocation": "uniform", "heating": {"rank": 0}}
    return method


# Without a rate: that of whatever optimiser the recipe asks for.
_AVERAGED = {"server_optimizer": {"name": "sgd", "lr": None}}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sa-fedlora": _method("staged", proximal_weight=0.01),
    "fedavg": _method("full", aggregation=_AVERAGED),
    "fedprox": _method("full", proximal_weight=0.01, aggregation=_AVERAGED),
    "fedlora": _fixed("factor-average"),
    "ffa-lora": _fixed("freeze-a"),
    "flora": _fixed("stacking"),
    "flexlora": _fixed("product-svd"),
    "hetlora": _fixed("zero-pad"),
    "fedex-lora": _fixed("residual"),
    "rolora": _fixed("alternate"),
    "fedsa-lora": _fixed("share-a"),
    "lora-fair": _fixed("correct"),
    "spd-cfl": _initiated_by_adapter("staged", proximal_weight=0.01, acceptance="target"),
    "head-only": _without_factors(train_biases=False),
    "bitfit": _without_factors(train_biases=True),
}


def preset(method: object, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys that a method fills in; none for an unknown one.

    Where ranks fall and clients train with adamw, `adapter.scaling` is `alpha_over_rank`: adamw's
    steps have one size whatever the gradient's, so a step moves D by about lr * scale * rank, and
    under a constant scale a cut from rank 16 to 4 cuts the learning rate to a quarter too (source:
    this project; measured in benchmarks/README.md).

    Args:
        method: a preset's name.
        recipe: what the user has written.
    """
    keys = PRESETS.get(method, {}) if isinstance(method, str) else {}
    clients = recipe.get("clients")
    optimizer = clients.get("optimizer") if isinstance(clients, Mapping) else None
    name = optimizer.get("name") if isinstance(optimizer, Mapping) else None
    if usual_scaling(method, name) != "constant":
        return merged(keys, {"adapter": {"scaling": usual_scaling(method, name)}})
    return keys


def usual_scaling(method: object, optimizer: object) -> str:
    """Return `adapter.scaling` where a recipe says nothing: see `preset`."""
    keys = PRESETS.get(method, {}) if isinstance(method, str) else {}
    falls = keys.get("annealing", {}).get("mode") == "staged"
    return "alpha_over_rank" if falls and optimizer == "adamw" else "constant"


def usual_server_rate(optimizer: object) -> float:
    """Return `aggregation.server_optimizer.lr` where a recipe says nothing.

    Adam and yogi move each weight by about their rate at first; 1 is plain averaging for the rest.
    """
    return 0.01 if optimizer in ("adam", "yogi") else 1.0


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the deep merge of two mappings; values of `over` win.

    A mapping whose keys are no names, such as ranks with their shares, is a value.

    >>> merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if is_section(value) and is_section(below):
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result


def is_section(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value is a mapping whose keys are names."""
    return isinstance(value, Mapping) and all(str(key).isidentifier() for key in value)
