"""Layers that can get factors: nn.Linear, and GPT-2's Conv1D with its transposed weight.

Source: this project; a transposed weight as with PEFT's `fan_in_fan_out`.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rayfed_lora.types import ModuleShape

# Names that PEFT rejects as LoRA targets, and the model types it rejects them in
# (`peft.tuners.tuners_utils._check_lora_target_modules_mamba`).
_PEFT_REJECTS = frozenset({"out_proj", "conv1d"})
_PEFT_REJECTS_IN = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
# Largest rounding error, relative to the largest value. In float32, sums in another order differ by
# about 1e-6, after two dozen layers by about 1e-5; mixed-in padding changes results by over 1e-2.
_ROUNDING = 1e-4


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Return whether a module is a linear layer of a kind that can get factors."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer's weight is (d_in, d_out)."""
    return isinstance(module, Conv1D)


def sides(module: nn.Module) -> ModuleShape:
    """Return the sizes of a linear layer."""
    if isinstance(module, Conv1D):
        return ModuleShape(module.nx, module.nf)
    if isinstance(module, nn.Linear):
        return ModuleShape(module.in_features, module.out_features)
    raise TypeError(f"need a linear layer, got {type(module).__name__}")


def unsuitable(net: nn.Module) -> dict[str, str]:
    """Return the linear layers of a plain model that cannot get factors, each with the reason."""
    model_type = getattr(getattr(net, "config", None), "model_type", None)
    # By object id: the number of modules that hold a parameter, and the parents of a module.
    users = Counter(id(p) for module in net.modules() for p in module._parameters.values())
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    for module in net.modules():
        for child in module._modules.values():
            parents[id(child)].append(module)
    plain: dict[type, bool] = {}
    found = {}
    for name, module in net.named_modules():
        if not is_linear(module):
            continue
        ending, above = name.rpartition(".")[2], parents[id(module)]
        if type(module) not in plain:
            plain[type(module)] = _is_plain(module)
        if ending in _PEFT_REJECTS and model_type in _PEFT_REJECTS_IN:
            found[name] = f"PEFT rejects it in a model of type {model_type}"
        elif any(isinstance(parent, nn.MultiheadAttention) for parent in above):
            found[name] = "nn.MultiheadAttention reads its weight and never calls it"
        elif not plain[type(module)]:
            found[name] = f"{type(module).__name__} has a forward of its own, not nn.Linear's"
        elif len(above) > 1 or users[id(module.weight)] > 1:
            found[name] = "its weight is shared with another module"
    return found


def _is_plain(module: nn.Linear | Conv1D) -> bool:
    """Return whether a linear layer computes exactly x W^T + bias, so that it can be replaced.

    A subclass with a forward of its own is checked on a copy with random values.
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
        except Exception:  # its input is not that of a linear layer
            return False
        return isinstance(y, torch.Tensor) and nearly_equal(
            y, functional.linear(x, own.weight, own.bias)
        )


def nearly_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors have the same shape, and values that differ by rounding only."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= _ROUNDING * expected.abs().max())
