"""Linear layers that compute a group of clients at once, each client with weights of its own.

The first dimension holds the rows of the group's clients one after the other, equally many for
each client. Frozen weights act on all rows as one batch, trained weights on each client's rows.
Source: this project; a layer with factors equals `peft.tuners.lora.Linear`, arXiv:2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from rayfed_lora.models.linear import is_transposed, sides
from rayfed_lora.models.precision import arithmetic, product

# Number of weights up to which merging was measured to be faster (benchmarks/README.md).
_SMALL = 1 << 13


@dataclass(frozen=True)
class GroupFactors:
    """The factors of one module: a (group, rank, d_in), b (group, d_out, rank), scale of both.

    Lower ranks are padded with zeros in both factors, where the gradients are zero too. `scale` is
    (group, 1, 1), or (1, 1, 1) where all clients have the same; it is not trained.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with LoRA factors for each client of a group, or without factors."""

    def __init__(self, plain: nn.Module, dropout: float) -> None:
        """Take over a layer's parameters, under the same names; factors read dropped-out inputs."""
        nn.Module.__init__(self)
        shape = sides(plain)
        self.in_features, self.out_features = shape.d_in, shape.d_out
        self.weight, self.bias = plain.weight, plain.bias  # type: ignore[assignment]
        self.transposed = is_transposed(plain)
        self.dropout = dropout
        self.factors: GroupFactors | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias + scale_g (x_g A_g^T) B_g^T, (group * rows, ..., d_out)."""
        weight = self.weight.t() if self.transposed else self.weight
        x = arithmetic(x, weight)
        if self.factors is None:
            return product(x, weight, self.bias)
        a, scaled = self.factors.a, self.factors.b * self.factors.scale
        rows = _by_client(x, len(a))
        if self._merges(rows):
            weights = torch.baddbmm(weight.to(a.dtype), scaled, a).transpose(1, 2)
            y = torch.bmm(rows, weights)
            y = y if self.bias is None else y.add_(self.bias)
        else:
            dropped = functional.dropout(x, self.dropout, self.training) if self.dropout > 0 else x
            low = torch.bmm(_by_client(dropped, len(a)), a.transpose(1, 2))
            # In place, since y has no other user and a copy takes longer than the product.
            y = product(rows, weight, self.bias)
            y = y.baddbmm_(low, scaled.transpose(1, 2).to(y.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def _merges(self, rows: torch.Tensor) -> bool:
        """Return whether x_g (W + scale_g B_g A_g)^T is faster than separate factors.

        The gradient of a merged weight is as large as W for each client, which pays for small
        layers only.
        """
        drops = self.dropout > 0 and self.training
        # Rounding the merged weight to bf16 would lose a small update.
        if drops or torch.is_autocast_enabled(rows.device.type):
            return False
        small = self.weight.numel() <= _SMALL or not torch.is_grad_enabled()
        return small and rows.shape[1] >= self.in_features + self.out_features


class ClientLinear(nn.Linear):
    """A densely trained linear layer with a copy of its weights for each client of a group."""

    def __init__(self, plain: nn.Linear) -> None:
        """Take over a plain layer's parameters, under the same names."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        # By parameter name, (group, d_out, d_in) and (group, d_out); empty: the plain layer's own.
        self.copies: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x_g W_g^T + bias_g, (group * rows, ..., d_out)."""
        if not self.copies:
            return functional.linear(x, self.weight, self.bias)
        weight = self.copies["weight"]
        y = torch.bmm(_by_client(x, len(weight)), weight.transpose(1, 2))
        if "bias" in self.copies:
            y = y + self.copies["bias"].unsqueeze(1)
        return y.view(*x.shape[:-1], self.out_features)


def _by_client(x: torch.Tensor, group: int) -> torch.Tensor:
    """Return the rows of each client, (group, rows * ..., d)."""
    if x.shape[0] % group != 0:
        raise ValueError(
            f"need the examples of {group} clients in the first dimension, got {tuple(x.shape)}"
        )
    return x.reshape(group, -1, x.shape[-1])
