"""Layers that can get factors: nn.Linear, and GPT-2's Conv1D, whose weight is transposed.

Source: this project; LoRA on a transposed weight as PEFT's `fan_in_fan_out`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rayfed_lora.types import ModuleShape

# Names that PEFT rejects as LoRA targets, and the kinds of models it rejects them in
# (`peft.tuners.tuners_utils._check_lora_target_modules_mamba`).
_PEFT_REJECTS = frozenset({"out_proj", "conv1d"})
_PEFT_REJECTS_IN = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
# Largest difference that is rounding, as a share of the largest value.
_ROUNDING = 1e-4


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Return whether a module is a linear layer of a kind that can get factors."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer's weight is (d_in, d_out)."""
    return isinstance(module, Conv1D)


def sides(module: nn.Module) -> ModuleShape:
    """Return the sides of a linear layer.

    Raises:
        TypeError: it is none.
    """
    if isinstance(module, nn.Linear):
        return ModuleShape(module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return ModuleShape(module.nx, module.nf)
    raise TypeError(f"need a linear layer, got {type(module).__name__}")


def unsuitable(net: nn.Module) -> dict[str, str]:
    """Return the linear layers of a model that cannot get factors, each with the reason.

    Args:
        net: a plain model, with or without values.
    """
    config = getattr(net, "config", None)
    kind = getattr(config, "model_type", None)
    used, parents = _uses(net)
    plain: dict[type, bool] = {}
    found = {}
    for name, module in net.named_modules():
        if not is_linear(module):
            continue
        ending, above = name.rpartition(".")[2], parents[id(module)]
        if type(module) not in plain:
            plain[type(module)] = _computes_a_product(module)
        if ending in _PEFT_REJECTS and kind in _PEFT_REJECTS_IN:
            found[name] = f"PEFT rejects it in a model of type {kind}"
        elif any(isinstance(parent, nn.MultiheadAttention) for parent in above):
            found[name] = "nn.MultiheadAttention reads its weight and never calls it"
        elif not plain[type(module)]:
            found[name] = f"{type(module).__name__} has a forward of its own, not nn.Linear's"
        elif len(above) > 1 or used[id(module.weight)] > 1:
            found[name] = "its weight is shared with another module"
    return found


def _uses(net: nn.Module) -> tuple[Mapping[int, int], Mapping[int, list[nn.Module]]]:
    """Return how many modules hold a parameter, and the modules that a module is a child of."""
    used: dict[int, int] = defaultdict(int)
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    for module in net.modules():
        for parameter in module._parameters.values():
            used[id(parameter)] += 1
        for child in module._modules.values():
            parents[id(child)].append(module)
    return used, parents


def _computes_a_product(module: nn.Linear | Conv1D) -> bool:
    """Return whether a linear layer gives x W^T + bias and nothing else, as it must to be replaced.

    A subclass with a forward of its own is tried on a copy with random values.
    """
    if type(module) is Conv1D or type(module).forward is nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        own = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        for parameter in own.parameters():
            parameter.normal_()
        x = torch.randn(3, 2, own.weight.shape[1])
        try:
            y = own(x)
        except Exception:  # whatever it wants to see, it is not what a linear layer sees
            return False
        expected = functional.linear(x, own.weight, own.bias)
        if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
            return False
        return bool((y - expected).abs().max() <= _ROUNDING * expected.abs().max())
