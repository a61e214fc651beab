"""Which modules of a model are adapted, which make up its head, and how large all are.

Source: this project; name matching as in PEFT (a name ending after a dot, or one full match).
"""

from __future__ import annotations

import re

from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.tracing import traced
from rayfed_lora.recipe import Adapter, Recipe
from rayfed_lora.types import ModelShape, ModuleShape

# Query and value projections by the names that transformers' models give them.
_QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"))


def model_shape(net: nn.Module, recipe: Recipe) -> ModelShape:
    """Return the sizes of a model (real or on the meta device) under the recipe's adapter.

    Raises:
        ModelError: no module matches, one is not a plain linear layer, or heating.rank does not
            fit the smallest one.
    """
    names = adapted_modules(net, recipe.adapter)
    modules = {name: _shape(net.get_submodule(name)) for name in names}
    if recipe.annealing.mode != "full":
        _check_rank(modules, recipe.annealing.heating.rank)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    head = head_parameters(net, recipe.adapter)
    head_params = sum(sizes[name] for name in head)
    trace = traced(net, recipe)
    return ModelShape(
        modules,
        head_params,
        sum(sizes.values()),
        tuple(head),
        obstacle=fusion_obstacle(net, recipe.adapter) or trace.obstacle,
        linear_flops=trace.linear_flops,
        activation_bytes=trace.activation_bytes,
    )


def fusion_obstacle(net: nn.Module, adapter: Adapter) -> str | None:
    """Return why this model cannot compute several clients in one batch; None where it can.

    Clients would meet in a normalisation over the batch; and a trained head is copied for each
    client, which is possible for linear layers.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} ({type(module).__name__}) normalises over the examples of a batch"
    if adapter.train_biases:
        return "every bias is trained (adapter.train_biases), in layers of all kinds"
    for name in head_parameters(net, adapter):
        owner = name.rpartition(".")[0]
        module = net.get_submodule(owner)
        if type(module) is not nn.Linear:
            return f"the head's {owner} is {type(module).__name__}, not nn.Linear"
    return None


def head_parameters(net: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of the densely trained parameters: the head's, every bias, or none."""
    head = tuple(f"{module}." for module in head_modules(net, adapter))
    return [
        name
        for name, _ in net.named_parameters()
        if (adapter.train_head and name.startswith(head))
        or (adapter.train_biases and name.endswith("bias"))
    ]


def head_modules(net: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of the modules that make up the head.

    `auto`: every direct child with parameters beside the encoder (transformers' base model).

    Raises:
        ModelError: a named module is not there, or nothing is beside the encoder.
    """
    with_parameters = [n for n, m in net.named_modules() if n and any(True for _ in m.parameters())]
    if adapter.head_modules == "auto":
        encoder = getattr(net, "base_model_prefix", "")
        found = [n for n, m in net.named_children() if n != encoder and n in with_parameters]
        if not found:
            raise ModelError(f"adapter.head_modules: the model has only its encoder {encoder!r}")
        return found
    absent = [name for name in adapter.head_modules if name not in with_parameters]
    if absent:
        children = ", ".join(n for n in with_parameters if n.count(".") <= 1)
        raise ModelError(f"adapter.head_modules: no module {absent[0]!r}; there are {children}")
    return list(adapter.head_modules)


def adapted_modules(net: nn.Module, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that get factors, in model order.

    Raises:
        ModelError: nothing matches, or what matches is not a plain linear layer.
    """
    head = tuple(f"{name}." for name in head_modules(net, adapter))
    outside = {n: m for n, m in net.named_modules() if n and not f"{n}.".startswith(head)}
    linear = [name for name, module in outside.items() if isinstance(module, nn.Linear)]
    targets = adapter.target_modules
    if targets == "auto":
        return _query_and_value(linear)
    if targets == "all-linear" and linear:
        return linear
    found = [name for name in outside if _matches(targets, name)]
    if not found:
        raise ModelError(f"adapter.target_modules: {targets!r} matches nothing; {_offer(linear)}")
    other = [name for name in found if name not in linear]
    if other:
        kind = type(outside[other[0]]).__name__
        raise ModelError(
            f"adapter.target_modules: expected nn.Linear modules, {other[0]!r} is {kind};"
            f" {_offer(linear)}"
        )
    return found


def _query_and_value(linear: list[str]) -> list[str]:
    for pair in _QUERY_VALUE:
        found = [name for name in linear if name.rsplit(".", 1)[-1] in pair]
        if {name.rsplit(".", 1)[-1] for name in found} == set(pair):
            return found
    raise ModelError(
        "adapter.target_modules: auto finds no query and value projections; " + _offer(linear)
    )


def _matches(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ModelError(f"adapter.target_modules: {targets!r} is no regex: {error}") from None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _offer(linear: list[str]) -> str:
    if not linear:
        return "factors go to nn.Linear modules, and the model has none outside of its head"
    endings = dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in linear)
    return f"the model's linear modules end in {', '.join(endings)}"


def _shape(module: nn.Module) -> ModuleShape:
    if not isinstance(module, nn.Linear):
        raise ModelError(f"expected nn.Linear, got {type(module).__name__}")
    return ModuleShape(module.in_features, module.out_features)


def _check_rank(modules: dict[str, ModuleShape], rank: int) -> None:
    for name, shape in modules.items():
        if rank > shape.max_rank:
            raise ModelError(
                f"annealing.heating.rank: expected at most {shape.max_rank}, the smaller side of"
                f" {name} ({shape.d_out} x {shape.d_in}), got {rank}"
            )
