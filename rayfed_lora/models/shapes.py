"""The sizes of a model under an adapter, and whether its clients can be fused.

Source: this project.
"""

from __future__ import annotations

from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.heads import head_modules, head_notes, head_parameters
from rayfed_lora.models.linear import sides
from rayfed_lora.models.targets import Targets, choose_targets
from rayfed_lora.models.tracing import trace_forward
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import ModelShape, ModuleShape


def model_shape(net: nn.Module, recipe: Recipe) -> ModelShape:
    """Return the sizes of a model (real or on the meta device) under the recipe's adapter.

    Raises:
        ModelError: no module matches, a match is not a plain linear layer, or heating.rank
            exceeds the smallest side of a module.
    """
    trace = trace_forward(net, recipe)
    targets = _targets(net, recipe, trace.unused)
    modules = {name: sides(net.get_submodule(name)) for name in targets.names}
    if recipe.annealing.mode != "full":
        _check_rank(modules, recipe.annealing.heating.rank)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    head = head_parameters(net, recipe.adapter)
    return ModelShape(
        modules,
        sum(sizes[name] for name in head),
        sum(sizes.values()),
        tuple(head),
        obstacle=fusion_obstacle(net, recipe.adapter) or trace.obstacle,
        linear_flops=trace.linear_flops,
        activation_bytes=trace.activation_bytes,
        notes=(*head_notes(net, recipe.adapter), *targets.notes),
    )


def _targets(net: nn.Module, recipe: Recipe, unused: frozenset[str]) -> Targets:
    """Return the adapted modules; they may be none where the method trains no factors."""
    rank = 0 if recipe.annealing.mode == "full" else recipe.annealing.heating.rank
    adapter = recipe.adapter
    head = head_modules(net, adapter)
    try:
        found = choose_targets(net, adapter.target_modules, head, rank=rank, unused=unused)
    except ModelError:
        if rank > 0 or adapter.target_modules not in ("auto", "all-linear"):
            raise
        return Targets([])
    # Without factors, notes on modules that get none are irrelevant.
    return found if rank > 0 else Targets(found.names)


def adapted_modules(net: nn.Module, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that can get factors of any rank, in model order.

    Raises:
        ModelError: nothing matches, or a match is not a plain linear layer.
    """
    return choose_targets(net, adapter.target_modules, head_modules(net, adapter)).names


def fusion_obstacle(net: nn.Module, adapter: Adapter) -> str | None:
    """Return why this model cannot compute several clients in one batch; None where it can.

    Batch normalisation would mix the clients. A trained head is copied for each client, which is
    implemented for linear layers only.
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


def _check_rank(modules: dict[str, ModuleShape], rank: int) -> None:
    for name, shape in modules.items():
        if rank > shape.max_rank:
            raise ModelError(
                f"annealing.heating.rank: expected at most {shape.max_rank}, the smaller side of"
                f" {name} ({shape.d_out} x {shape.d_in}), got {rank}"
            )
