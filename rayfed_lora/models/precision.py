"""Frozen weights in 16 bits under arithmetic in float32.

A weight is converted for each product, forward and again backward: only one layer's float32 copy
is there at a time, and none is saved for the backward pass. Under autocast the 16-bit weight is
used as it is. Vectors (biases, norms), and weights that anything but linear layers and embeddings
read, stay float32: they are few. Source: this project.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rayfed_lora.models.linear import is_transposed

_SHORT = (torch.bfloat16, torch.float16)


def is_short(dtype: object) -> bool:
    """Return whether a configuration's type is one of 16 bits; a text, torch's, or None."""
    return str(dtype).removeprefix("torch.") in ("bfloat16", "float16")


def shortened(net: nn.Module, trained: Collection[str] = ()) -> frozenset[str]:
    """Return the names of the parameters that `shorten` keeps in 16 bits.

    These are the matrices of linear layers and embeddings, as far as no other layer uses them.
    """
    users: dict[int, list[bool]] = defaultdict(list)
    for name, module in net.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                own = f"{name}.{key}" if name else key
                known = type(module) in (nn.Linear, Conv1D) or isinstance(module, nn.Embedding)
                users[id(parameter)].append(known and key == "weight" and own not in trained)
    named = net.named_parameters()
    return frozenset(name for name, p in named if p.dim() == 2 and all(users[id(p)]))


def shorten(net: nn.Module, dtype: torch.dtype, trained: Collection[str] = ()) -> None:
    """Keep the large weights of a plain model in a type, and all else in float32; in place.

    Args:
        net: the plain model, in any type.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        trained: names of parameters that stay float32, since they are trained.
    """
    short = shortened(net, trained) if dtype in _SHORT else frozenset()
    for name, parameter in net.named_parameters():
        parameter.data = parameter.data.to(dtype if name in short else torch.float32)
    for module in net.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.float()
    compute_in_float32(net)


def compute_in_float32(net: nn.Module) -> None:
    """Let the layers of a plain model with weights in 16 bits compute in the type of their input.

    Linear layers and embeddings are changed in place; they keep their type and parameters.
    """
    for module in net.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype not in _SHORT:
            continue
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_in_float32)
        elif isinstance(module, (nn.Linear, Conv1D)):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _in_float32(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
    del module, args
    return out.float()


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight.t() if is_transposed(module) else module.weight
    return product(arithmetic(x, weight), weight, module.bias)


def arithmetic(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's input in the type to compute in.

    Some models convert it to the type of the weight, which is not that of the arithmetic here.
    """
    short = weight.dtype in _SHORT and x.dtype in _SHORT
    return x.float() if short and not torch.is_autocast_enabled(x.device.type) else x


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias in the type of x; W (d_out, d_in) may be frozen in 16 bits."""
    if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight, bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return functional.linear(x, weight.to(x.dtype), bias)
    found: torch.Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """x W^T + bias with a frozen W, which is converted again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        # Not `linear`, which returns a view: the caller adds to this in place.
        y = torch.matmul(x, weight.to(x.dtype).t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None
